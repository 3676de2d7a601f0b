from typing import Any

from vlprune.report.markdown import render_markdown


def test_summary_shows_every_stage_of_a_score(report: dict[str, Any]) -> None:
    text = render_markdown(report)
    assert "| variant | task | metric | dense | dense, fine-tuned | pruned | pruned, fine-tuned | ONNX |" in text
    assert "| multiflow-0.9 | vqa | accuracy | 98.0 | 98.5 | 31.0 | 95.0 | 95.1 |" in text
    assert "| multiflow-0.9 | captioning | CIDEr | 750.0 | – | – | – | – |" in text


def test_details_show_intervals_sparsity_and_runtime(report: dict[str, Any]) -> None:
    text = render_markdown(report)
    assert "### vqa (scenes)" in text
    row = "| multiflow-0.9-finetuned | 90.00 % | ONNX Runtime, cpu, fp32 | 500 | 95.1 [93.0, 97.0] |"
    assert row in text
    assert "| dense | 0.00 % | PyTorch, cpu, fp32 | 500 | 80.0 [70.0, 90.0] | 750.0 [710.0, 790.0] |" in text


def test_other_sections(report: dict[str, Any]) -> None:
    text = render_markdown(report)
    assert text.startswith(
        "# Compression of blip-tiny\n\n**multiflow-0.9**: 90.00 % of the prunable weights removed\n\n"
    )
    assert "\n\nFamily blip, checkpoint embedded; 3,000,000 parameters, " in text
    assert "| multiflow-0.9 | multiflow | unstructured | 90.00 % | 90.0000 % | 90.00 % | 90.00 % |" in text
    assert "| fp32 | 4.20 MB | 4.20 MB | 10.00 % | 2.4e-06 | 0.999999 |" in text
    assert "| 8 | 10.00 | 10.10 | 12.50 | 792.1 | 0.990 [0.970, 1.010] | no measurable difference |" in text
    assert "| prune | 1.2 | 900.00 MB | – |" in text
    assert "- Processor: Some | processor, 2 threads\n- GPU: none" in text


def test_the_verdict_comes_first_and_details_are_folded(report: dict[str, Any]) -> None:
    report["graphs"][0] |= {"packed": True, "weights": "fp16", "bytes": 1_050_000}
    text = render_markdown(report)
    head, details = text.split("<details>", 1)
    assert "\n- vqa accuracy 98.5 → 95.0 (−3.5; intervals apart)\n" in head
    assert "\n- packed fp16: 1.05 of 4.20 MB (25.0 %)\n" in head
    assert "\n- plain, cpu: of 1 timings no measurable difference in 1 (0.99 ×)\n" in head
    assert "## Scores" in head and "## Throughput" not in head
    assert details.count("<summary>") == text.count("</details>") == 6
    assert "<summary>ONNX graphs</summary>\n\n## ONNX graphs\n\n" in text  # without the empty line no Markdown


def test_no_tag_begins_in_a_name(report: dict[str, Any]) -> None:
    report["model"]["name"] = "</details><img src=x>"
    report["environment"]["cpu"] = "half a \ud800 character"
    text = render_markdown(report)
    assert text.startswith("# Compression of &lt;/details>&lt;img src=x>\n")
    text.encode()


def test_a_disturbed_timing_gets_no_verdict(report: dict[str, Any]) -> None:
    assert "marked disturbed" not in render_markdown(report)
    report["throughput"][0] |= {"ratio_ci95": [0.9, 0.95], "note": "other processes disturbed 9 of 12 rounds"}
    text = render_markdown(report)
    assert "| 0.990 [0.900, 0.950] | disturbed |" in text
    assert "Timings marked disturbed get no verdict" in text


def test_unstructured_zeros_are_not_sold_as_speed(report: dict[str, Any]) -> None:
    sentence = "do not make standard ONNX operators faster"
    assert sentence in render_markdown(report)
    for variant in report["variants"]:
        variant["pattern"] = None
    assert sentence not in render_markdown(report)


def test_random_weights_are_marked_and_get_no_accuracy(report: dict[str, Any]) -> None:
    report["model"]["random_weights"] = True
    text = render_markdown(report)
    assert "**The weights are random" in text
    assert "## Scores" not in text
    assert "98.0" not in text


def test_names_cannot_break_the_table(report: dict[str, Any]) -> None:
    report["stages"][0]["name"] = "a|b\nc"
    assert "| a\\|b c | 1.2 |" in render_markdown(report)


def test_skipped_records_are_told(report: dict[str, Any]) -> None:
    report["metrics"][0]["skipped"] = 3
    assert "### vqa (scenes; 3 broken records skipped)" in render_markdown(report)


def test_a_report_of_one_stage_renders(report: dict[str, Any]) -> None:
    for section in ("metrics", "graphs", "throughput"):
        report[section] = []
    text = render_markdown(report)
    assert "## Sparsity" in text
    assert "## Scores" not in text
    assert "\n\n\n" not in text
