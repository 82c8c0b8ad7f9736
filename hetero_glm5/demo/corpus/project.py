"""Questions about this project, its flags and GLM-5, and small talk, each with one short answer."""

from __future__ import annotations

from collections.abc import Iterator

from hetero_glm5.demo.corpus.document import Document, Task, assistant, chat, opening, user
from hetero_glm5.demo.corpus.words import Draw, unfolded

KIND = "project"
FLAGS = """
--model = names the checkpoint folder in Hugging Face format
--device = says where attention and device experts run: auto, cuda or cpu
--dtype = sets the type outside the experts: bfloat16 or float32
--trust-remote-code = is accepted; nothing from a checkpoint is ever executed
--latent-norm-eps = sets the epsilon of the q and kv latent norms
--kt-weight-path = says where the routed experts are: a packed store or a checkpoint
--kt-weight-mode = chooses whether a packed store is copied into ram or mapped with mmap
--kt-method = chooses the weight format of the experts, such as BF16, FP8, INT8 or INT4
--kt-cpuinfer = sets the threads for the host experts; 0 means all physical cores
--kt-threadpool-count = sets over how many NUMA nodes the host experts are divided
--kt-numa-nodes = names the NUMA nodes that hold the host experts
--kt-num-gpu-experts = sets how many experts of each MoE layer are held on the device
--kt-gpu-experts-ratio = sets the share of all routed experts held on the device
--kt-expert-placement-strategy = chooses which experts start on the device
--init-expert-location = names a file of routing counts for the frequency strategy
--kt-gpu-prefill-token-threshold = sets from how many tokens a prefill streams experts to the GPU
--kt-enable-dynamic-expert-update = moves experts between the tiers by routing statistics
--kt-max-deferred-experts-per-token = sets how many host experts are added one layer later
--record-kt-gpu-expert-distribution = records which experts the device tier holds
--max-total-tokens = sets the number of tokens in the KV pool
--context-length = sets the longest sequence in tokens
--mem-fraction-static = sets the share of device memory for weights, experts and the KV pool
--kv-cache-dtype = sets the type of the cached latents and keys
--page-size = sets the number of tokens in a page of the KV pool
--chunked-prefill-size = sets how many tokens one step computes at most
--enable-mixed-chunk = lets decode rows ride along with prefill chunks
--max-running-requests = sets how many requests are computed together
--max-queued-requests = sets how many requests may wait; one more is refused
--attention-backend = chooses the attention implementation
--fp8-gemm-backend = is accepted; there is one implementation
--tensor-parallel-size = must be 1, because there is one device
--enable-p2p-check = is accepted; there is no peer device
--disable-shared-experts-fusion = is accepted; the shared expert is never fused
--speculative-algorithm = chooses how draft tokens are made ahead
--speculative-num-steps = sets the number of draft steps
--host = sets the address to listen on
--port = sets the port to listen on; the default is 30000
--served-model-name = sets the model's name in the API
--api-key = makes the server require this key
--reasoning-parser = separates reasoning from content; use glm45
--tool-call-parser = turns tool calls into the API's tool_calls; use glm47
--watchdog-timeout = sets the seconds without progress after which the server gives up
"""
TERMS = """
hetero_glm5 | this project = hetero_glm5 serves GLM-5 on one workstation: the hot experts run on the GPU, the others
  on the CPU.
GLM-5 = GLM-5 is a language model with 744 billion parameters, of which 40 billion are active for each token.
MLA | multi-head latent attention = MLA is multi-head latent attention: it caches one small latent for each token.
DSA | sparse attention | DeepSeek Sparse Attention = DSA is sparse attention: an indexer chooses the positions that
  each token attends to.
MoE | a mixture of experts = A mixture of experts has many small networks and sends each token to a few of them.
MTP | multi-token prediction = MTP is multi-token prediction: one more layer drafts the next token ahead.
the indexer = The indexer scores all earlier positions and keeps the best ones for attention.
the shared expert = The shared expert is the one that every token visits.
a routed expert = A routed expert is computed only for the tokens that the router sends to it.
the router = The router scores the experts and picks the best 8 for each token.
the KV cache = The KV cache keeps the latents and keys of earlier tokens, so that they are not computed again.
a packed store | the expert store = A packed store is a folder of safetensors files with experts packed once.
prefill = Prefill computes the prompt's tokens before the first new token.
decode = Decode computes one new token for each sequence in a step.
chunked prefill = Chunked prefill divides a long prompt into steps of limited size.
continuous batching = Continuous batching lets requests join and leave between steps.
preemption = Preemption takes the pages of one request so that others can go on.
KTransformers = KTransformers is a project that runs experts on the CPU; its flags start hetero_glm5 too.
AMX = AMX is an instruction set for matrix tiles, from Sapphire Rapids on.
AVX-512 = AVX-512 is an instruction set with vectors of 512 bits.
NUMA = NUMA means that each processor has memory of its own that it reads faster.
INT4 = INT4 is a weight format with 4 bits for each weight and a scale for each group.
INT8 = INT8 is a weight format with 8 bits for each weight.
FP8 = FP8 is a weight format with 8 bits in floating point and a scale for each block of 128 by 128.
BF16 = BF16 is a floating point format with 16 bits and the range of 32.
a KV page = A KV page holds 64 tokens by default.
the scheduler = The scheduler picks the rows of a step: decode first, then prefill chunks.
the sampler = The sampler draws the next token from the logits.
the tokenizer = The tokenizer turns text into token ids and back.
the chat template = The chat template turns messages into one prompt.
speculative decoding = Speculative decoding drafts tokens ahead and verifies them in one step.
the roofline = The roofline says how fast a kernel can be from its bytes and operations.
"""
FACTS = """
How many experts does GLM-5 have? | How many routed experts are in a layer of GLM-5? = Each MoE layer of GLM-5 has
  256 routed experts and 1 shared expert.
How many experts does a token visit? | How many experts are active for each token? = Each token visits 8 routed
  experts and the shared one.
How many layers does GLM-5 have? = GLM-5 has 78 layers; the first 3 are dense.
How many parameters does GLM-5 have? | How big is GLM-5? | How large is GLM-5? = GLM-5 has 744 billion parameters;
  40 billion are active for each token.
How wide is GLM-5? | What is the hidden size of GLM-5? = The hidden size of GLM-5 is 6144.
How many attention heads does GLM-5 have? = GLM-5 has 64 attention heads.
How many positions does sparse attention keep? | What is index_topk in GLM-5? = Sparse attention keeps 2048
  positions for each token.
Which port does the server use? | On which port does the server listen? = The server listens on port 30000 unless
  --port says otherwise.
How do I start the server? | How can I start it? | How do I run the server? = Run make serve, or python -m
  hetero_glm5.launch_server with --model.
How do I run the tests? | How can I test it? = Run make test; make test-all adds the long ones.
How do I measure the speed? | How do I run the benchmarks? = Run make bench; it prints times beside the memory
  bandwidth.
How do I pack the experts? | How do I quantize a model? | How can I make a packed store? = Run hetero-glm5 quantize
  with the checkpoint, the store and --kt-method.
How do I check a packed store? | How do I verify a store? = Run hetero-glm5 verify with the store; it compares
  checksums.
Do I need a GPU? | Can it run without a GPU? | Does it work on a CPU only? = No GPU is needed: with --device cpu the
  same code runs on the CPU.
Which API does the server speak? | Can I use the openai client? = The server speaks the OpenAI API, so the openai
  client works.
Does it support tool calls? | Can you call tools? = Yes, tool calls work, also while streaming.
Does it support streaming? | Can it stream answers? = Yes, answers, reasoning and tool calls can be streamed.
Which instruction sets does it use? | Which CPUs are supported? = It has kernels for AMX, AVX-512, AVX2 and plain
  scalar code.
Where do the experts live? | Where are the experts kept? = Some experts are on the GPU; all others are in host memory.
Where does attention run? = Attention runs on the GPU, or on the CPU with --device cpu.
Which weight formats are there? | Which formats can experts have? = Experts can be FP32, BF16, FP8, INT8 or INT4.
Which models does it serve? | Which models can I run? = It serves GLM-5, 5.1, 5.2 and 5.3.
Which operating system does it need? | Does it run on Linux? = It needs Linux on x86-64.
Which Python version does it need? = It needs Python 3.10 or newer.
What is the license? | Under which license is it? = The license is Apache 2.0.
Where is a flag defined? | Where do I find the flags? = Every flag is one field in config.py.
Where are the formulas? | Where is the reference code? = The formulas are in ops/reference.py.
How do I force an instruction set? = Set HETERO_GLM5_ISA to its name.
Who made you? | Who wrote you? | Who created you? = I was trained by the hetero_glm5 project as its demo model.
Who are you? | What are you? | What is your name? | Tell me who you are. = I am the demo model of hetero_glm5, a
  small model with GLM-5's architecture.
What can you do? | How can you help me? | What are you good at? = I can add numbers, call tools, tell stories and
  answer questions about hetero_glm5.
Are you a human? | Are you a real person? = No, I am a small language model.
How big are you? | How many parameters do you have? = I am small: less than 10 million parameters.
How old are you? = I am a program, so I have no age.
Where do you live? = I run on your machine, inside hetero_glm5.
"""
TALK = """
Hello | Hello! | Hi | Hi! | Hi there | Hey | Hello there! | Good day = Hello! How can I help you?
Good morning | Good morning! = Good morning! How can I help you?
Good evening | Good evening! = Good evening! How can I help you?
How are you? | How are you doing? | How is it going? | Hello, how are you? = I am fine, thank you. How can I help you?
Thanks | Thanks! | Thank you | Thank you! | Thank you very much. | Thanks a lot! = You are welcome!
Bye | Bye! | Goodbye | Goodbye! | See you later! | Good night = Goodbye!
Well done! | Great! | Very good. | Nice work! = Thank you!
Can you help me? | I need help. | Please help me. = Of course. What do you need?
Tell me a joke. | Do you know a joke? = Why did the expert stay at home? Nobody routed a token to it.
Say something nice. = You ask good questions.
"""
ASK_FLAG = (
    "What does {} do? | What is {} for? | What does the flag {} do? | Explain {}. | Tell me about {}. | What is {}?"
)
ASK_TERM = "What is {}? | What does {} mean? | Explain {}. | Tell me about {}. | Can you explain {}? | What's {}?"
LEADS = (
    "",
    "",
    "",
    "",
    "",
    "Please tell me: ",
    "A question: ",
    "Hello! ",
    "Hi, ",
    "I would like to know: ",
    "Quickly: ",
)


def _rows(text: str) -> list[tuple[list[str], str]]:
    rows = [line.split(" = ", 1) for line in unfolded(text).splitlines()]
    return [(asks.split(" | "), said) for asks, said in rows]


def _with(phrases: str, subjects: list[str]) -> list[str]:
    return [phrase.format(subject) for phrase in phrases.split(" | ") for subject in subjects]


FLAG_ROWS = [(_with(ASK_FLAG, flags), f"{flags[0]} {said}.") for flags, said in _rows(FLAGS)]
TERM_ROWS = [(_with(ASK_TERM, terms), said) for terms, said in _rows(TERMS)]
FACT_ROWS, TALK_ROWS = _rows(FACTS), _rows(TALK)
SMALL_TALK = {ask: "This is small talk." for asks, _ in TALK_ROWS for ask in asks}  # the reasoning about each


def question(draw: Draw) -> tuple[str, str]:
    """A question and its answer; the question's wording belongs to the split."""

    def make() -> tuple[str, str]:
        kind = draw.rng.random()
        asks, said = draw.choice(FLAG_ROWS if kind < 0.35 else TERM_ROWS if kind < 0.6 else FACT_ROWS)
        ask = draw.choice(asks)
        return draw.choice(LEADS) + ask, said

    return draw.until(make, lambda made: made[0])


def small_talk(draw: Draw) -> tuple[str, str]:
    """Too short to be held out: the same few phrases in both splits."""
    asks, said = draw.choice(TALK_ROWS)
    return draw.choice(asks), said


def documents(draw: Draw) -> Iterator[Document]:
    while True:
        thinking = draw.chance(0.5)
        messages = opening(draw)
        for _ in range(draw.choice((1, 1, 2, 3, 4, 5))):
            ask, said = small_talk(draw) if draw.chance(0.2) else question(draw)
            reasoning = SMALL_TALK.get(ask, "This is about hetero_glm5.") if thinking else ""
            messages += [user(ask), assistant(said, reasoning)]
        yield chat(KIND, messages)


def tasks(draw: Draw, tokens: int) -> Iterator[Task]:
    while True:
        ask, said = question(draw)
        yield Task(KIND, [user(ask)], None, draw.chance(0.5), said)
