"""What a model is worth: held-out perplexity, questions with known answers, tool calls, drafting and routing.

Everything runs through the project's own LLM, engine, chat template and parsers, on the held-out part of demo/corpus;
report.measure puts the parts together. Only drafting, which the engine does not do yet, drives the model itself.
"""
