"""What `--help` of the commands that take recipes shows: the options that matter first, without importing torch.

`--help.SECTION` and `--help.all` show the rest, from the parser itself; a test compares these pages with it.
"""

SECTIONS = {
    "model": "gradients, optimizer, learning rate: a LightningModule",
    "data": "corpus, tokenizer, batch, block size: a LightningDataModule",
    "trainer": "all of Lightning's Trainer: devices, precision, loggers, callbacks",
    "checkpoint": "when checkpoints are written, which are kept",
    "samples": "the text that is written at each validation",
    "figures": "pictures for TensorBoard",
    "watch": "lost, hanging and drifting ranks",
}
COMMON = """\
  --config FILE                       a recipe; several, the later ones win: see configs/
  --print_config                      print the recipe, all settings filled in, and stop
  --json                              the result as one line of JSON; progress goes to stderr"""
NET = """\
  --model.init_args.net CLASS         Bigram, BagOfWords, MLP, WaveNet, GatedWaveNet, RNN, GRU, LSTM, GPT, Encoder,
                                      Seq2Seq of lm.models, or your own"""
DATA = """\
  --data CLASS                        [lm.data.TextData]; or LinesData, ChatData, PairData, ClassData,
                                      SourceTargetData, ArithmeticData, ReverseData
  --data.init_args.corpus PATH        a text, a folder, a prepared corpus; python-docs, shakespeare, names
  --data.init_args.batch_size N       sequences a step, over all processes and micro-batches"""
REST = "\n".join(
    [
        "every setting of a recipe is an option, by its full name; more about them:",
        *(f"  --help.{name:<28} {what}" for name, what in SECTIONS.items()),
        f"  --help.{'all':<28} all options of this command",
    ]
)
FIT = f"""
Train a network; writes checkpoints/RUN and logs/RUN.

  lm fit --config configs/quickstart.yaml
  lm fit --config configs/quickstart.yaml --name wide --model.init_args.net.init_args.n_embd 192 --trainer.max_steps 500

{COMMON}
the run
  --name RUN                          its name [the config's file name]
  --ckpt_path last|auto|PATH          last continues, auto continues or starts, a path starts from that checkpoint
  --init_from CHECKPOINT              begin with these weights, or a Hugging Face folder's, at step 0; symbols that it
                                      lacks begin untrained, and a recipe without a net has its network
  --plot                              draw the losses in the terminal at the end
  --seed_everything N                 [1337]
the training
  --trainer.max_steps N               how many optimizer steps
  --trainer.val_check_interval N      steps between validations
  --trainer.devices N                 processes: one a GPU, or a share of the cores [auto]
  --trainer.num_nodes N               machines [1]
  --trainer.strategy KIND             ddp, or fsdp2, which shards the network [auto]
  --trainer.precision KIND            32-true, bf16-mixed, 16-mixed, 64-true; auto: the faster of the first two here
  --trainer.accumulate_grad_batches N micro-batches a step [1]
  --checkpoint.every_n_steps N        steps between checkpoints
the network and its data
  --model CLASS                       [lm.training.LanguageModel]; lm.training.ManualLanguageModel: gradients by hand;
                                      RewardModel, DPO, PolicyGradient of lm.posttraining
  --rules FILE                        with gradients by hand: Python with rules of your own, see docs/gradients.md
{NET}
  --model.init_args.optimizer CLASS   [torch.optim.AdamW]; the learning rate is its init_args.lr
{DATA}
  --data.init_args.block_size N       tokens a sequence, of the network too

{REST}"""
EVALUATE = f"""
Evaluate a checkpoint on the whole of a split, once; the recipe is the checkpoint's own.

  lm COMMAND --ckpt_path checkpoints/quickstart/best.ckpt

  --ckpt_path CHECKPOINT              which checkpoint; needed
  --split NAME                        val, test or train [SPLIT]
{COMMON}
{DATA}
  --trainer.devices N                 processes [1]
  --trainer.accelerator KIND          auto, cpu, gpu [auto]
  --trainer.precision KIND            [the checkpoint's]

{REST}"""
GRADIENTS = f"""
Compare gradients derived by hand with autograd's, parameter by parameter; exit 1 where one disagrees.

  lm gradients --config configs/quickstart.yaml
  lm gradients --config configs/names/mlp-by-hand.yaml --level atomic

{COMMON}
what is compared
  --dtype KIND                        [float64], float32, or bfloat16: products in bfloat16, the rest in float32
  --level KIND                        [fused]: each parameter; atomic: every tensor of the MLP, as in the lecture
  --against KIND                      [autograd], or differences: slopes of the loss along random directions
  --mode KIND                         [train] or eval, of the network
  --init_from CHECKPOINT              of these weights, and this network where the recipe names none
  --rules FILE                        Python with rules of your own, under @lm.backprop.rule(Layer)
  --values                            the numbers, too: a corner of each tensor and its gradient, largest element, norm
  --tensor NAME                       of one tensor alone
  --seed N                            of weights and batch
{NET}
{DATA}

{REST}"""
PLAN = f"""
Say what a recipe needs of a cluster: memory, hours, strategy. Nothing is trained.

  lm plan --config configs/gpt2-124m.yaml --devices 8 --gpu A100

{COMMON}
the cluster
  --num_nodes N                       machines [1]
  --devices N                         GPUs of each [1]
  --gpu NAME                          their kind [H100]
  --mfu X                             share of the GPU's FLOP/s that is used [0.4]
what changes the answer most
  --init_from CHECKPOINT              its network, where the recipe names none
  --trainer.max_steps N               how many optimizer steps
  --trainer.precision KIND            32-true, bf16-mixed
  --trainer.accumulate_grad_batches N micro-batches a step [1]
  --model.init_args.activation_checkpointing true
{NET}
{DATA}

{REST}"""
INSPECT = f"""
Show what a recipe is made of: layers with shapes and parameters, a batch, what a text becomes. Nothing is trained.

  lm inspect --config configs/names/wavenet.yaml
  lm inspect --config configs/quickstart.yaml --text "def f(x): return x"

{COMMON}
what is shown
  --text TEXT                         in tokens of the recipe's tokenizer, in bytes, in those of the published ones
  --figures FOLDER                    pictures of the network and its first batch, PNG
  --init_from CHECKPOINT              of these weights, and this network where the recipe names none
{NET}
{DATA}

{REST}"""
BENCH = f"""
Time a recipe's training steps on this machine, by part, or the tokens of a text. No checkpoints, no logs.

  lm bench --config configs/quickstart.yaml
  lm bench --config configs/quickstart.yaml --model lm.training.LanguageModel --model lm.training.ManualLanguageModel

{COMMON}
what is timed
  --model CLASS                       repeatable: side by side, by turns, each as it is and compiled
  --model.init_args.compile true      compiled alone, or false: not at all
  --generate                          the tokens of a text, in the dtypes of lm sample
  --steps N                           of each; by default, half a second of them in each of nine turns
  --trainer.precision KIND            32-true, bf16-mixed
  --init_from CHECKPOINT              its network, where the recipe names none
{NET}
{DATA}

{REST}"""
PAGES = {
    "fit": FIT,
    "validate": EVALUATE.replace("COMMAND", "validate").replace("SPLIT", "val"),
    "test": EVALUATE.replace("COMMAND", "test").replace("SPLIT", "test"),
    "gradients": GRADIENTS,
    "plan": PLAN,
    "inspect": INSPECT,
    "bench": BENCH,
}


def page(command: str) -> str:
    """Return what `lm COMMAND --help` prints."""
    return f"usage: lm {command} [options]\n{PAGES[command]}"
