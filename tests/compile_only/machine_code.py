"""Loops of machine code, and of the PTX it is made from."""

import re
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Code:
    """Instructions in their order, what each jumps to, and after which the next one does not follow."""

    lines: list[str]
    jumps: dict[int, int]
    ends: set[int]

    @classmethod
    def of_ptx(cls, text: str) -> "Code":
        """Labels of inline assembly may appear more than once: the nearest is meant."""
        lines: list[str] = []
        labels: dict[str, list[int]] = {}
        for line in (line.split("//")[0].strip() for line in text[text.index(".entry") :].splitlines()):
            if found := re.fullmatch(r"([\w$]+):", line):
                labels.setdefault(found[1], []).append(len(lines))
            elif line and line[0] not in ".{}()":
                lines.append(line)
        lines.append("end")
        jumps, ends = {}, set()
        for at, line in enumerate(lines):
            jump = re.match(r"(@\S+\s+)?bra(?:\.uni)?\s+([\w$]+)", line)
            if jump:
                jumps[at] = min(labels[jump[2]], key=lambda target: abs(target - at))
            if (jump and not jump[1]) or re.match(r"(ret|exit|trap)\b", line):
                ends.add(at)
        return cls(lines, jumps, ends)

    @classmethod
    def of_sass(cls, text: str) -> "Code":
        found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", text, re.M)
        index = {int(address, 16): at for at, (address, _) in enumerate(found)}
        jumps, ends = {}, set()
        for at, (_, line) in enumerate(found):
            # `BRA 0x10`, `@P0 BRA 0x10`, `BRA.U UP0, 0x10`, `BRA.DIV UR4, 0x10`.
            jump = re.match(r"(@\S+\s+)?BRA\S*\s+(.*?)`?\(?0x([0-9a-f]+)", line)
            if jump and int(jump[3], 16) in index:
                jumps[at] = index[int(jump[3], 16)]
            if (jump and not jump[1] and not jump[2]) or re.match(r"(EXIT|RET\S*|BRX\S*)\b", line):
                ends.add(at)
        return cls([line for _, line in found], jumps, ends)

    def loops(self, inside: re.Pattern[str]) -> list[list[str]]:
        """The innermost loops with such an instruction: each its instructions, in their order.

        A loop is what leads to a jump back to a place that all ways to the jump go through; compilers put parts of it
        elsewhere.
        """
        size = len(self.lines)
        cuts = {0, *self.jumps.values(), *(at + 1 for at in (*self.jumps, *self.ends) if at + 1 < size)}
        starts = sorted(cuts)
        block = {start: n for n, start in enumerate(starts)}
        stops = [*starts[1:], size]
        after: list[list[int]] = []
        for stop in stops:
            last = stop - 1
            following = [block[self.jumps[last]]] if last in self.jumps else []
            after.append(following + ([block[stop]] if last not in self.ends and stop < size else []))
        before: list[list[int]] = [[] for _ in after]
        for n in _reached(0, after.__getitem__):
            for following_block in after[n]:
                before[following_block].append(n)
        above = [1] + [(1 << len(after)) - 1] * (len(after) - 1)  # bits of the blocks on every way to each
        changed = True
        while changed:
            changed = False
            for n in range(1, len(after)):
                if before[n]:
                    mask = -1
                    for m in before[n]:
                        mask &= above[m]
                    changed |= above[n] != (mask | 1 << n)
                    above[n] = mask | 1 << n
        bodies: dict[int, set[int]] = {}
        for head, ways in enumerate(before):
            for n in ways:
                if above[n] >> head & 1:
                    known = bodies.setdefault(head, {head})
                    known |= _reached(n, lambda m, head=head: [] if m == head else before[m])  # type: ignore[misc]
        found = []
        for body in bodies.values():
            at = [i for n in sorted(body) for i in range(starts[n], stops[n])]
            if any(inside.search(self.lines[i]) for i in at):
                found.append((at, body))
        inner = [at for at, body in found if not any(other < body for _, other in found)]
        return [[self.lines[i] for i in at] for at in sorted(inner)]


def _reached(start: int, onward: Callable[[int], list[int]]) -> set[int]:
    found, waiting = {start}, [start]
    while waiting:
        new = set(onward(waiting.pop())) - found
        found |= new
        waiting += new
    return found
