"""Counts in machine code, as cuobjdump and nvdisasm print it: instructions of a kernel, and of its loops.

Loops are natural loops of the control flow: the back edges of its dominator tree, not branches to lower addresses,
which compilers also use to leave rarely taken blocks behind the others.
"""

import re
from dataclasses import dataclass
from functools import cached_property

import networkx

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_FUNCTION = re.compile(r"Function : (\S+)")
_ENDS = ("EXIT", "RET", "BRX", "JMX", "KILL", "BPT")
_JUMPS = ("BRA", "JMP", "CALL", "BRX")


@dataclass(frozen=True)
class Instruction:
    """One instruction of a kernel."""

    address: int
    guard: str
    """The predicate that it is under, or ""; a branch may have it among its operands instead."""
    opcode: str
    operands: str

    @property
    def name(self):
        """The opcode without its modifiers."""
        return self.opcode.split(".")[0]

    @property
    def target(self):
        """Where a branch or call goes, or None."""
        if self.name not in _JUMPS:
            return None
        found = re.findall(r"0x([0-9a-f]+)", self.operands)
        return int(found[-1], 16) if found else None

    @property
    def goes_on(self):
        """Whether the next instruction may follow."""
        conditional = self.guard not in ("", "PT", "UPT") or re.search(r"\bU?P\d", self.operands)
        return bool(conditional) or ".DIV" in self.opcode or self.name not in (*_ENDS, "BRA", "JMP")


class Code:
    """Some instructions of a kernel, in the order of their addresses."""

    def __init__(self, instructions):
        self.instructions = sorted(instructions, key=lambda each: each.address)

    def __len__(self):
        return len(self.instructions)

    def __iter__(self):
        return iter(self.instructions)

    def count(self, pattern):
        """Instructions whose opcode, modifiers included, begins with a match of the pattern."""
        return sum(re.match(rf"(?:{pattern})(?![A-Z0-9])", each.opcode) is not None for each in self.instructions)

    def has(self, *patterns):
        """Whether there is an instruction of each pattern."""
        return all(map(self.count, patterns))


class Loop(Code):
    """A natural loop, with the loops inside it."""

    def __init__(self, flow, header, blocks):
        super().__init__(each for block in blocks for each in flow.nodes[block]["code"])
        self.header, self.blocks, self._flow = header, blocks, flow
        self.inner = []
        """The loops directly inside."""

    @property
    def own(self):
        """What is in no inner loop."""
        inside = {each.address for loop in self.inner for each in loop}
        return Code(each for each in self if each.address not in inside)

    def nest(self):
        """The loop and all loops inside it."""
        return [self, *(each for inner in self.inner for each in inner.nest())]

    def common_pass(self, pattern):
        """The shortest way through the loop that has as many instructions of the pattern as any, as code.

        It leaves out what branches around, as for the ends of rows. A loop inside takes one turn.
        """
        flow = self._flow.subgraph(self.blocks).copy()
        latches = [*flow.predecessors(self.header)]
        flow.remove_edges_from([edge for loop in self.nest() for edge in flow.in_edges(loop.header)
                                if edge[0] in loop.blocks])  # fmt: skip
        best = {}
        for block in networkx.topological_sort(flow):
            ways = [best[before] for before in flow.predecessors(block) if before in best]
            if block == self.header or ways:
                way = min(ways, default=(0, 0, ()))
                code = Code(flow.nodes[block]["code"])
                best[block] = way[0] - code.count(pattern), way[1] + len(code), (*way[2], block)
        _, _, blocks = min(best[block] for block in latches if block in best)
        return Code(each for block in blocks for each in flow.nodes[block]["code"])

    def after_last(self, pattern):
        """What one pass does when no instruction of the pattern can follow in it any more."""
        flow = self._flow.subgraph(self.blocks).copy()
        flow.remove_edges_from([*flow.in_edges(self.header)])
        have = {block for block in flow if Code(flow.nodes[block]["code"]).count(pattern)}
        before = set().union(*(networkx.ancestors(flow, block) for block in have))
        again = {block for block in have if any(to in before | have for to in flow.successors(block))}
        after = [each for block in flow if block not in before | have for each in flow.nodes[block]["code"]]
        for block in have - before - again:
            code = flow.nodes[block]["code"]
            last = max(i for i, each in enumerate(code) if Code([each]).count(pattern))
            after += code[last + 1 :]
        return Code(after)


class Kernel(Code):
    """The disassembly of one kernel."""

    def __init__(self, name, instructions):
        super().__init__(instructions)
        self.name = name
        # The compiler fills up with branches to themselves and NOPs behind the last instruction.
        while self.instructions and (self.instructions[-1].name == "NOP" or self._waits_for_ever(-1)):
            self.instructions.pop()

    def _waits_for_ever(self, i):
        last = self.instructions[i]
        return last.name == "BRA" and last.target == last.address

    @cached_property
    def flow(self):
        """The control flow, a graph of blocks by the address of their first instruction; each has its ``code``."""
        following = dict(zip(self.instructions, self.instructions[1:], strict=False))
        starts = {self.instructions[0].address}
        for each in self:
            if each.target is not None or not each.goes_on:
                starts |= {each.target} - {None}
                starts |= {following[each].address} if each in following else set()
        graph, block = networkx.DiGraph(), None
        for each in self:
            if each.address in starts:
                block = each.address
                graph.add_node(block, code=[])
            graph.nodes[block]["code"].append(each)
            if each.target is not None:
                graph.add_edge(block, each.target)
            after = following.get(each)
            if after is not None and each.goes_on and after.address in starts:
                graph.add_edge(block, after.address)
        outside = [address for address in graph if "code" not in graph.nodes[address]]
        graph.remove_nodes_from(outside)  # a call of another function
        return graph

    @cached_property
    def loops(self):
        """All loops, outer ones first."""
        first = self.instructions[0].address
        parents = networkx.immediate_dominators(self.flow, first)
        bodies = {}
        for block, header in self.flow.edges:
            if block in parents and header in _dominators(parents, block, first):
                bodies.setdefault(header, {header}).update(_body(self.flow, block, header))
        by_size = sorted(bodies.items(), key=lambda item: -len(item[1]))
        found = [Loop(self.flow, header, blocks) for header, blocks in by_size]
        for i, loop in enumerate(found):
            around = [outer for outer in found[:i] if loop.blocks < outer.blocks]
            if around:
                around[-1].inner.append(loop)
        return found

    def innermost(self, *patterns, without=()):
        """The smallest loops that have an instruction of each pattern, and none of ``without``."""
        fit = [loop for loop in self.loops if loop.has(*patterns) and not any(map(loop.count, without))]
        return [loop for loop in fit if not any(inner in fit for inner in loop.nest()[1:])]


def kernels(text):
    """The kernels of a disassembly, by their mangled names."""
    parts = _FUNCTION.split(text)[1:]
    return {name: Kernel(name, parse(code)) for name, code in zip(parts[::2], parts[1::2], strict=True)}


def parse(text):
    """The instructions of a kernel's disassembly."""
    return [Instruction(int(at, 16), guard or "", opcode, operands.strip())
            for at, guard, opcode, operands in _INSTRUCTION.findall(text)]  # fmt: skip


def _dominators(parents, block, first):
    yield block
    while block != first:
        block = parents[block]
        yield block


def _body(flow, block, header):
    """The blocks from which a back edge's ``block`` is reached without passing the header."""
    body, waiting = set(), [block]
    while waiting:
        block = waiting.pop()
        if block != header and block not in body:
            body.add(block)
            waiting += flow.predecessors(block)
    return body
