"""Bad recipes, made by code: numbers are those of the list of bad inputs."""

from __future__ import annotations

from check_command import DATA

# item: what stands below `name:` and `model:` (so it starts on line 3), the code, the place in recipe.yaml, words
RECIPES: dict[str, tuple[str, str, str | None, str]] = {
    "65 unknown key": (DATA + "trian: {}\n", "E-RECIPE-102", ":4:1", "Did you mean 'train'?"),
    "65 deeper": ("data:\n  train: rows.jsonl\n  sytem: x\n", "E-RECIPE-102", ":5:3", "data.sytem"),
    "65 in a union": (DATA + "tuning: {kind: lora, rnk: 3}\n", "E-RECIPE-102", ":4:22", "Did you mean 'rank'?"),
    "66 number as text": (DATA + "train: {learning_rate: '1e-5'}\n", "E-RECIPE-103", ":4:9", "learning_rate"),
    "67 duplicate key": (DATA + "data: {train: x}\n", "E-RECIPE-101", ":4:1", "duplicate key"),
    "67 duplicate below": (DATA + "train: {seed: 1, seed: 2}\n", "E-RECIPE-101", ":4:18", "duplicate key"),
    "68 alias bomb": ("a: &a [x, x]\nb: &b [*a, *a]\n" + DATA, "E-RECIPE-101", ":3:4", "anchor"),
    "68 merge key": (DATA + "train:\n  <<: {epochs: 1}\n", "E-RECIPE-101", ":5:3", "merge key"),
    "68 deep nesting": (DATA + "x: " + "[" * 20_000, "E-RECIPE-101", ":4:", "deeper"),
    "68 Python tag": (
        DATA + "device: !!python/object/apply:os.system ['id']\n",
        "E-RECIPE-101",
        ":4:9",
        "python/object",
    ),
    "68 tag on a block": ("data: !!python/object:x\n  train: rows.jsonl\n", "E-RECIPE-101", ":3:7", "tag"),
    "69 yes": (DATA + "train: {activations: yes}\n", "E-RECIPE-103", ":4:9", "'yes'"),
    "69 on": (DATA + "train: {activations: on}\n", "E-RECIPE-103", ":4:9", "'on'"),
    "69 sexagesimal": (DATA + "train: {seed: 1:30}\n", "E-RECIPE-103", ":4:9", "'1:30'"),
    "69 date": (DATA + "device: 2024-01-01\n", "E-RECIPE-103", ":4:1", "device"),
    "70 negative": (DATA + "train: {epochs: -1}\n", "E-RECIPE-103", ":4:9", "epochs is -1"),
    "70 zero": (DATA + "train: {batch_tokens: 0}\n", "E-RECIPE-103", ":4:9", "at least 8"),
    "70 NaN": (DATA + "train: {learning_rate: .nan}\n", "E-RECIPE-103", ":4:9", "finite"),
    "70 infinity": (DATA + "train: {epochs: .inf}\n", "E-RECIPE-103", ":4:9", "epochs is inf"),
    "70 bool for int": (DATA + "train: {seed: true}\n", "E-RECIPE-103", ":4:9", "integer"),
    "70 bool for float": (DATA + "train: {epochs: true}\n", "E-RECIPE-103", ":4:9", "number"),
    "70 text for int": (DATA + "train: {seed: '4'}\n", "E-RECIPE-103", ":4:9", "integer"),
    "70 5000 digits": (DATA + f"train: {{seed: {'9' * 5000}}}\n", "E-RECIPE-101", "", "digits"),
    "72 more than the positions": ("data: {train: rows.jsonl, max_tokens: 1024}\n", "E-MODEL-201", "", "512 positions"),
    "73 contradiction": (DATA + "train: {batch_tokens: 64}\n", "E-RECIPE-201", "", "micro_batch_tokens"),
    "75 runs is a file": (DATA + "runs: recipe.yaml\n", "E-SYS-004", "", "cannot be written"),
    "78 a secret in the recipe": (DATA + "hub_token: hf_secret\n", "E-RECIPE-102", ":4:1", "hub_token is not a known key"),
    "80 tested on what is trained": (
        "data: {train: rows.jsonl, test: {kind: file, file: ./rows.jsonl}, max_tokens: 256}\n",
        "E-DATA-012",
        "",
        "is named for train and for test",
    ),
    "no such format": ("data: {train: {files: rows.jsonl, format: x}}\n", "E-RECIPE-103", None, "data.train.format"),
    "no expression": ("data: {train: {files: rows.jsonl, where: 'a =='}}\n", "E-RECIPE-103", None, "data.train.where"),
    "task of that name": ("data: {tasks: {a: {files: rows.jsonl}}, hold_out: [b]}\n", "E-RECIPE-201", ":3:1", "no task"),
    "rate without explicit": ("data: {tasks: {a: {files: rows.jsonl, rate: 1.0}}}\n", "E-RECIPE-201", ":3:1", "explicit"),
    "variable of no template": (DATA + "template: {kind: own, settings: {thinking: true}}\n", "E-RECIPE-103", None,
                                "'thinking' is no variable"),
    "no data": ("tuning: {kind: full}\n", "E-RECIPE-104", "", "data is missing"),
    "no kind": (DATA + "tuning: {rank: 3}\n", "E-RECIPE-104", ":4:1", "tuning.kind"),
    "a list": (DATA + "- 1\n", "E-RECIPE-101", ":4:1", "block end"),
    "a tab": ("data:\n\ttrain: x\n", "E-RECIPE-101", ":4:1", "cannot start any token"),
    "control character": (DATA + "# \x07\n", "E-RECIPE-101", "", "not allowed"),
    "a name that is a path": (DATA + "name: ../t\n", "E-RECIPE-101", ":4:1", "duplicate key"),
}  # fmt: skip

# Settings that are taken, and what is said of them: item: the recipe, words of `educe check`.
DOUBTFUL: dict[str, tuple[str, str]] = {
    "28 a file named twice": (
        "data: {tasks: {a: {files: rows.jsonl}, b: {files: ./rows.jsonl}}, max_tokens: 256}\n",
        "is named more than once",
    ),
    "60 answers cut": ("data: {train: rows.jsonl, max_tokens: 17, too_long: cut}\n", "cut before their stop token"),
    "71 no multiple": (DATA + "train: {batch_tokens: 3000, micro_batch_tokens: 2048}\n", "is no multiple of"),
    "74 a high rate": (DATA + "train: {learning_rate: 0.1}\n", "learning_rate 0.1 is high"),
    "74 a low rate for adapters": (DATA + "train: {learning_rate: 1e-7}\ntuning: {kind: lora}\n", "1e-07 is low"),
}
