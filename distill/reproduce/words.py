"""Placeholder until the task is written."""


class WordsTask:
    def __init__(self, **k):
        raise NotImplementedError
