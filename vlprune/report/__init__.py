"""report.json and what is made of it: the schema, report.md, the table in the terminal, the manifest."""
