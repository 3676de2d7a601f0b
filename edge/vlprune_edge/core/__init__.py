"""Files of vlprune that need no PyTorch, put here by the build: see CMakeLists.txt."""
