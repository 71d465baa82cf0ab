def code(prompts, completions, **columns):
    return [float(sum(map(ord, text)) % 7) for text in completions]


def length(prompts, completions, **columns):
    return [float(len(text)) for text in completions]
