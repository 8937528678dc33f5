"""What `--help` shows: a screen for each command, true to its parser, and all that README and docs mention."""

import re
import subprocess
import sys
from contextlib import suppress

import pytest

from lm.cli import COMMANDS, help, main
from lm.cli.fit import Fit
from lm.cli.gradients import Compare
from lm.cli.plan import Plan
from tests.conftest import ROOT

NOT_OURS = {"help", "version", "rm", "user", "target", "nproc-per-node"}  # of docker, torchrun and the like


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with suppress(SystemExit):
        assert main(words) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_a_screen(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    lines = shown(capsys, command, "--help").splitlines()
    assert lines[0].startswith(f"usage: lm {command} ")
    assert len(lines) <= 50 and max(map(len, lines)) <= 120


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_an_option_takes_in_words(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, command, "--help")
    assert not re.search(r"<(class|function)|lambda|object at|type: |default: |Literal|Optional|\| null|None", text)


def test_an_option_is_shown_with_its_bounds_and_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(shown(capsys, "sample", "--help").split())
    for said in (
        "--ckpt_path PATH The checkpoint. (needed)",
        "--prompt TEXT Text to continue; it is printed too. --prompt_file PATH A UTF-8 file with the prompt. --max",
        "0 always takes the likeliest. (at least 0) [1.0]",
        "this probability (Holtzman et al., 2019). (above 0 and at most 1) --min_p X",
        "--seed N Of the random choices. [1337] --device TEXT",
        "--json Print the result as JSON; the text goes to stderr. Chooses",
    ):
        assert said in text, said
    assert "Share for testing. (at least 0 and below 1) [0.0]" in " ".join(shown(capsys, "prepare", "--help").split())
    sections = "".join(shown(capsys, "fit", f"--help.{section}") for section in ("samples", "watch", "data", "model"))
    for said in ("samples.max_new_tokens N", "watch.timeout X", "data.tokenizer TEXT", "across_documents {true,false}"):
        assert f"  --{said}" in sections or f"  --data.{said}" in sections, said
    assert "[true]" in sections and "[false]" in sections


@pytest.mark.parametrize("command", help.PAGES)
def test_a_page_is_true_to_its_parser(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    every = shown(capsys, command, "--help.all")
    classes = shown(capsys, command, "--help.model") + shown(capsys, command, "--help.data")
    page = help.page(command)
    assert f"  lm {command} --" in page, "an example"
    for option in set(re.findall(r"--[\w.]+", page)):
        if option.startswith("--help") or option.startswith("--model.init_args.net.init_args."):
            continue
        plain = option.replace(".init_args", "")
        assert re.search(rf"{re.escape(plain)}\b", classes if ".init_args" in option else every), option
    assert "known subclasses: torch" not in classes


def test_defaults_of_the_pages() -> None:
    recipe = ["--config", str(ROOT / "configs/quickstart.yaml"), "--print_config"]
    fit, plan, compare = (_defaults(kind, recipe) for kind in (Fit, Plan, Compare))
    assert (fit["seed_everything"], fit["trainer.devices"], fit["trainer.num_nodes"]) == (1337, "auto", 1)
    assert (fit["trainer.strategy"], fit["trainer.accumulate_grad_batches"]) == ("auto", 1)
    assert (plan["num_nodes"], plan["devices"], plan["gpu"], plan["mfu"]) == (1, 1, "H100", 0.4)
    chosen = ("dtype", "level", "against", "mode")
    assert [compare[name] for name in chosen] == ["float64", "fused", "autograd", "train"]
    for name, text in ((name, str(compare[name])) for name in chosen):
        assert re.search(rf"--{name} .*\[{text}\]", help.page("gradients")), name


def _defaults(kind: type, words: list[str]) -> dict[str, object]:
    cli = kind.__new__(kind)
    found: dict[str, object] = {}

    def keep(parser, args) -> None:
        found.update({action.dest: action.default for action in parser._actions})
        raise SystemExit(0)

    cli.parse_arguments = keep
    with pytest.raises(SystemExit):
        kind.__init__(cli, words, "")
    return found


@pytest.mark.parametrize("section", help.SECTIONS)
def test_a_section(section: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "fit", f"--help.{section}")
    assert text.count(f"--{section}.") >= 3
    others = {name for name in help.SECTIONS if f"  --{name}." in text}
    assert others == {section}


def test_a_section_of_a_class_that_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--data.operators" in shown(capsys, "fit", "--help.data", "--data", "lm.data.ArithmeticData")


def test_no_such_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--help.trainr"]) == 2
    assert "say --help.all, or --help. and one of model, data" in capsys.readouterr().err


def test_help_imports_no_torch() -> None:
    code = "import sys; from lm.cli import main; main(['fit', '--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0


def test_every_option_in_readme_and_docs_is_found_in_some_help(capsys: pytest.CaptureFixture[str]) -> None:
    helps = "".join(shown(capsys, command, "--help.all") for command in COMMANDS)
    helps += "".join(shown(capsys, "fit", f"--help.{section}") for section in ("model", "data"))
    for kind in ("LinesData", "ArithmeticData"):
        helps += shown(capsys, "fit", "--help.data", "--data", f"lm.data.{kind}")
    for kind in ("training.ManualLanguageModel", "posttraining.PolicyGradient"):
        helps += shown(capsys, "fit", "--help.model", "--model", f"lm.{kind}")
    texts = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    lines = [line for path in texts for line in path.read_text().splitlines() if re.search(r"\blm [a-z]+ --", line)]
    assert len(lines) > 40
    said = [re.split(r"\blm (?=[a-z]+ --)", line, maxsplit=1)[1] for line in lines]
    options = {option for text in said for option in re.findall(r"(?<!\S)--([\w.]+)", text)}
    parts = ("model.init_args.net.init_args.", "model.init_args.reward.init_args.")
    nets = {option for option in options if option.startswith(parts)}
    missing = [
        o
        for o in options - nets - NOT_OURS
        if not o.startswith("help.") and not re.search(rf"--{o.replace('.init_args', '')}\b", helps)
    ]
    assert missing == []
    assert nets, "those of a network and of a reward stand in its class"
