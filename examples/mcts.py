"""Monte Carlo tree search for responses that are right and that the student finds likely.

    python examples/mcts.py [TEACHER STUDENT]

A node is a response up to the end of a line. Each iteration walks down the tree by UCT, lets the teacher write
candidates for the next line where it arrives, finishes one of them, and adds the reward of the finished response to
every node on the way: the student's probability per token if the answer is right, else 0. All branches of the tree
share the pages of what they have in common, so the tree costs little more memory than its leaves.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from importlib.resources import files

from genssd import Branch, Chunk, Engine

PAIR = files("genssd.distill.small_pair")
LINE = Chunk(tokens=1, until="\n", limit=64)
REST = Chunk(tokens=192, until=None)
EXPLORATION = 0.5  # weight of the bonus of nodes that were rarely visited; rewards lie in [0, 1]


@dataclass(eq=False)
class Node:
    """A committed branch of the tree with its statistics."""

    branch: Branch
    children: list[Node] = field(default_factory=list)
    visits: int = 0
    total: float = 0.0

    def bound(self, parent_visits: int) -> float:
        """Return the upper confidence bound of the node's mean reward (UCT)."""
        if self.visits == 0:
            return math.inf
        return self.total / self.visits + EXPLORATION * math.sqrt(math.log(parent_visits) / self.visits)


def descend(tree: Node, width: int) -> list[Node]:
    """Return the nodes of a walk by the upper confidence bounds; a leaf that was visited before is expanded first."""
    path = [tree]
    while True:
        node = path[-1]
        if not node.children and node.visits and node.branch.ended is None:
            for child in node.branch.expand(width, LINE):
                child.commit()
                node.children.append(Node(child))
        if not node.children:
            return path
        path.append(max(node.children, key=lambda child: child.bound(node.visits)))


def finish(branch: Branch) -> Branch:
    """Return a branch that the teacher has finished; the one that it begins with does not change."""
    while branch.ended is None:
        (branch,) = branch.expand(1, REST)
        branch.commit()
    return branch


def reward(branch: Branch, answer: str) -> float:
    """Return the student's probability per token of a finished response with the right answer, else 0."""
    if branch.ended != "finished" or f"\\boxed{{{answer}}}" not in branch.text:
        return 0.0
    return math.exp(float(branch.response().stats.logprob.mean()))


def search(root: Branch, answer: str, iterations: int = 24, width: int = 3) -> tuple[float, str, Node]:
    """Return the highest reward, the text of its response, and the tree."""
    tree = Node(root)
    best = (0.0, "")
    for _ in range(iterations):
        path = descend(tree, width)
        finished = finish(path[-1].branch)
        value = reward(finished, answer)
        best = max(best, (value, finished.text))
        for node in path:
            node.visits += 1
            node.total += value
    return *best, tree


def main(teacher: str = str(PAIR / "teacher"), student: str = str(PAIR / "student")) -> None:
    engine = Engine.from_pretrained(teacher, student, memory_bytes=1 << 28)
    question = "Tom counts 34 red, 57 blue, 12 green and 45 white cards. How many cards are there?"
    root = engine.branch([{"role": "user", "content": question}], max_tokens=192)
    value, text, tree = search(root, answer="148")
    visits = [child.visits for child in tree.children]
    print(f"{engine.usage.sampled_tokens} tokens sampled, visits of the first lines {visits}, best reward {value:.3f}")
    print(text)
    del root, tree
    print(f"{engine.pages_in_use[0]} pages still held")


if __name__ == "__main__":
    main(*sys.argv[1:])
