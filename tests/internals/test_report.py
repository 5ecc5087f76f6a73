"""What a run leaves behind: files with a manifest, and one page of pictures, in a real browser."""

import hashlib
import json
import re

import numpy as np
import pytest
from safetensors import safe_open

from llama import SamplingParams
from llama.cli import main
from llama.internals.report import gather, html, report_plan
from llama.internals.store import manifest, model_hash, save
from llama.internals.trace import TraceError
from tests.server.browser import Browser

CAPTURE = ["layers.*.attn.pattern[head=1]", "logits"]


@pytest.mark.parametrize("ending", ["safetensors", "npz"])
def test_a_trace_is_written_with_all_that_is_needed_to_read_it(llm, tmp_path, ending):
    trace = llm.trace("Hello there", CAPTURE, positions=slice(1, None))
    path = tmp_path / f"trace.{ending}"
    save(trace, path, manifest(trace, "demo", model_hash(llm.directory), "float32"))
    if ending == "npz":
        read = dict(np.load(path))
        facts = json.loads(str(read.pop("manifest")))
    else:
        with safe_open(path, "np") as file:
            read, facts = {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["manifest"])
    assert read.keys() == set(trace) and all(np.array_equal(read[name], trace[name].numpy()) for name in trace)
    assert facts["ids"] == list(trace.ids) and facts["tokens"] == list(trace.tokens) and facts["dtype"] == "float32"
    assert facts["plan"]["capture"] == CAPTURE and facts["positions"]["logits"] == [1, 2][:len(trace["logits"])]
    assert facts["sites"]["attn.pattern"]["equation"] == "softmax(scores)"
    lines = [f"{name} {hashlib.sha256((llm.directory / name).read_bytes()).hexdigest()}\n"
             for name in ("config.json", "model.safetensors")]
    assert facts["model_sha256"] == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_a_file_is_whole_or_not_there(llm, tmp_path):
    trace = llm.trace("Hello", "embed")
    with pytest.raises(TraceError, match="trace.txt: end the name in .safetensors or .npz"):
        save(trace, tmp_path / "trace.txt", {})
    path = tmp_path / "trace.npz"
    path.write_bytes(b"before")
    trace.values["embed"] = None  # cannot be written
    with pytest.raises(AttributeError):
        save(trace, path, {})
    assert path.read_bytes() == b"before" and [one.name for one in tmp_path.iterdir()] == ["trace.npz"]


# ---- the command --------------------------------------------------------------------------------------------


def test_the_command_lists_the_sites(capsys):
    assert main(["trace", "--sites"]) == 0
    assert "layers.N.attn.q_rot        q turned by its position's angles" in capsys.readouterr().out


def test_the_command_writes_values_by_a_plan(tmp_path, capsys):
    plan = {"capture": [{"site": "logits", "positions": -1}], "edits": [{"edit": "zero", "site": "layers.*.mlp_out"}]}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    out = tmp_path / "values.npz"
    assert main(["trace", "Hello", "--plan", str(tmp_path / "plan.json"), "--capture", "embed", "--out", str(out)]) == 0
    read = np.load(out)
    assert read["logits"].shape == (1, 1280) and read["embed"].shape == (2, 256)
    assert "2 tensors of 3 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("flags, code, sentence", [
    ([], 2, "there is nothing to trace"), (["Hello"], 2, "give --html for pictures, --out for values"),
    (["Hello", "--out", "x.npz"], 2, "--out: there is nothing to write"),
    (["Hello", "--out", "x.npz", "--capture", "layers.*.none"], 1, "capture[0]: 'layers.*.none' matches no site"),
    (["Hello", "--out", "x.npz", "--plan", "none.json"], 1, "none.json: No such file"),
    (["Hello", "--out", "x.npz", "--plan", "bad.json"], 1, "bad.json: this is no JSON"),
    (["Hello", "--out", "x.npz", "--plan", "odd.json"], 1, "odd.json: edits: edits is a list")])
def test_a_command_that_cannot_be_is_one_sentence(tmp_path, monkeypatch, capsys, flags, code, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "odd.json").write_text('{"edits": 3}')
    assert main(["trace", *flags]) == code
    error = capsys.readouterr().err
    assert sentence in error and error.startswith("llama: error: ") and error.count("\n") == 1


# ---- the page -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium."""
    one = Browser()
    yield one
    one.close()


@pytest.fixture(scope="module")
def traced(llm):
    """A sum, and what the page shows of it."""
    prompt = llm.encode_chat([{"role": "user", "content": "What is 17 + 25?"}])
    plan = report_plan(llm.config, len(prompt))
    trace = llm.trace(prompt, plan.capture, params=SamplingParams(temperature=0.0, max_tokens=12))
    data = gather(llm.model, trace, llm.token_text, {"model": "</script><b id=planted>"})
    return trace, data


def test_the_page_shows_the_run_and_loads_nothing(browser, traced, tmp_path):
    trace, data = traced
    page = html(data)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page)
    (tmp_path / "page.html").write_text(page, "utf-8")
    browser.open(f"file://{tmp_path}/page.html")
    assert browser.complaints() == [] and browser.run("return document.getElementById('planted')") is None
    assert browser.text("#facts dd") == "</script><b id=planted>"
    shown = browser.run("return [...document.querySelectorAll('#text span')].map(one => one.textContent)")
    assert shown == list(trace.tokens)
    cells = browser.run("return [...document.getElementById('lens').rows].map(row => row.cells.length)")
    assert cells == [len(trace.ids)] * 7  # a header and six rows; a name and a cell for each computed token
    assert browser.run("return document.querySelectorAll('#heads canvas').length") == 20
    painted = browser.run("const c = document.querySelectorAll('#heads canvas')[0];"
                          "return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data].some(x => x > 0)")
    assert painted
    said = trace.tokens.index(" =", trace.num_prompt) + 1
    browser.run(f"document.querySelectorAll('#text span')[{said}].click()")
    assert browser.text("#said").startswith("Which part of the network said “4” after “␣”")
    shares = browser.run("return [...document.querySelectorAll('#parts td')].map(one => Number(one.textContent))")
    wanted = next(one for one in data["attribution"] if one["position"] == said)
    assert len(shares) == 5 * 5 + 1 and sum(shares) == pytest.approx(wanted["logit"], abs=0.15)
    browser.hover("#text span:nth-child(4)")
    assert "layer 4, after" in browser.text("#tip") and "%" in browser.text("#tip")


def test_the_page_is_dark_in_the_dark_and_light_on_paper(browser, traced, tmp_path):
    (tmp_path / "page.html").write_text(html(traced[1]), "utf-8")
    colours = {}
    for scheme in ("light", "dark"):
        browser.emulate(width=1000, height=800, scheme=scheme)
        browser.open(f"file://{tmp_path}/page.html")
        colours[scheme] = browser.run("return getComputedStyle(document.body).backgroundColor")
        assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
    browser.devtools("Emulation.setEmulatedMedia", media="print", features=[])
    colours["print"] = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert colours == {"light": "rgb(255, 255, 255)", "dark": "rgb(19, 20, 22)", "print": "rgb(255, 255, 255)"}


def test_on_paper_nothing_of_the_lens_is_cut_off(browser, traced, tmp_path):
    (tmp_path / "page.html").write_text(html(traced[1]), "utf-8")
    browser.emulate(width=720, height=1000, scheme="light")  # as wide as what is printed on a sheet
    browser.devtools("Emulation.setEmulatedMedia", media="")
    browser.open(f"file://{tmp_path}/page.html")
    names = """return [...document.querySelectorAll("table.lens")].filter((one) => one.checkVisibility())
        .map((one) => [...one.rows[0].cells].slice(1).map((cell) => cell.textContent))"""
    [whole] = browser.run(names)
    browser.devtools("Emulation.setEmulatedMedia", media="print", features=[])
    bands = browser.run(names)
    assert len(bands) > 3 and sum(bands, []) == whole and len(whole) == len(traced[0].ids) - 1
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")


def test_the_page_is_made_by_the_command(tmp_path, capsys):
    out = tmp_path / "out.html"
    assert main(["trace", "What is 17 + 25?", "--chat", "--max-tokens", "12", "--html", str(out)]) == 0
    assert "What the model did" in out.read_text("utf-8")


def test_words_that_would_end_the_script_do_not(llm):
    page = html({"tokens": ["</script>", "\u2028", "<!--"]})
    inside = page[page.index("const data = "):page.index("const { tokens")]
    assert "<" not in inside and "\u2028" not in inside
    assert json.loads(inside.removeprefix("const data = ").strip().removesuffix(";"))["tokens"][0] == "</script>"
