"""The lineage graph of a run: which artifact was made from which, by hash, and its drawing.

Nodes are read from disk, not from the plan: the corpus, the tokenizer, every checkpoint (a folder with `run.json`)
and the evaluation. An edge is drawn only where the hash that the child names is the hash that the parent has now.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fledge.config import config_hash
from fledge.formats.checkpoint import read_info
from fledge.recipes import card_format as say
from fledge.recipes.card_stages import STAGES, kind_of
from fledge.recipes.charts import number, text
from fledge.recipes.runs import Manifest, read_manifest

_COLUMN, _NODE_WIDTH, _NODE_HEIGHT, _ROW = 126.0, 110.0, 54.0, 92.0
_MARGIN = 48.0  # above and below, for edges that go around a box


@dataclass(frozen=True)
class LineageParent:
    """`role` is what the parent was to the child; `node` is None if no artifact of this run has `sha256`.

    `declared`: the child's own checkpoint names it; otherwise its stage's manifest does.
    """

    role: str
    sha256: str
    node: str | None
    declared: bool


@dataclass(frozen=True)
class LineageNode:
    """`id` is the path of the artifact inside the run folder; `sha256` is of its weights, its file, or its files."""

    id: str
    title: str
    stage: str
    kind: str
    sha256: str
    parents: tuple[LineageParent, ...]


@dataclass(frozen=True)
class _Found:
    """An artifact before its parents are looked up: the hashes by role that it, and its stage's manifest, name."""

    node: LineageNode
    declared: Mapping[str, str]
    listed: Mapping[str, str]


def read_lineage(run: Path) -> tuple[LineageNode, ...]:
    """The artifacts of the finished stages of `run`, parents before children where the ring's order says so."""
    manifests = {path.name: manifest for path in _stage_folders(run) if (manifest := read_manifest(path))}
    found: list[_Found] = []
    for stage in sorted(manifests, key=_order):
        checkpoints = _checkpoints(run, stage, manifests[stage])
        found += checkpoints or [_plain(stage, manifests[stage])]
    holders = {item.node.sha256: item.node.id for item in reversed(found)}  # of equal weights the first are the parents
    holders |= {config_hash(m.outputs): _representative(found, stage) for stage, m in manifests.items()}
    return _without_circles([_resolved(item, holders) for item in found])


def lineage_svg(nodes: Sequence[LineageNode]) -> str:
    """The graph from left to right. What a manifest lists is left out where a
    longer path implies it."""
    if not nodes:
        return ""
    depth = _depths(nodes)
    ancestors = _ancestors(nodes, depth)
    columns: dict[int, list[LineageNode]] = {}
    for node in nodes:
        columns.setdefault(depth[node.id], []).append(node)
    rows = max(len(column) for column in columns.values())
    width = _COLUMN * (max(columns) + 1) - (_COLUMN - _NODE_WIDTH) + 8
    height = _ROW * rows + 2 * _MARGIN
    places: dict[str, tuple[float, float]] = {}
    for column, members in columns.items():
        for row, node in enumerate(members):
            y = height / 2 + (row - (len(members) - 1) / 2) * _ROW
            places[node.id] = (4 + column * _COLUMN, y)
    links = [(node, parent) for node in nodes for parent in _drawn(node, ancestors)]
    drawn = [_edge(node, parent, places) for node, parent in links]
    body = [edge for edge, _ in drawn]
    body += [_box(node, places[node.id]) for node in nodes]
    body += [role for _, role in drawn]
    told = "; ".join(f"{n.title} {n.sha256[:12]}" for n in nodes)
    return (
        f'<svg class="lineage" viewBox="0 0 {number(width)} {number(height)}" width="{number(width)}" '
        f'height="{number(height)}" role="img" aria-label="{text(f"Lineage: {told}")}">{"".join(body)}</svg>'
    )


def _stage_folders(run: Path) -> list[Path]:
    return sorted(path.parent for path in run.glob("*/manifest.json"))


def _order(stage: str) -> int:
    names = [kind.name for kind in STAGES]
    return names.index(stage) if stage in names else len(names)


def _checkpoints(run: Path, stage: str, manifest: Manifest) -> list[_Found]:
    """Every checkpoint below a stage's folder, `model` first; training states are no checkpoints."""
    folders = sorted((path.parent for path in (run / stage).glob("**/run.json")), key=lambda p: (p.name != "model", p))
    found = []
    for folder in folders:
        info, files = read_info(folder)
        kind = kind_of(stage)
        name = kind.short or kind.title
        name = name if folder.name == "model" else f"{name} {folder.name}"
        node_id = str(folder.relative_to(run))
        node = LineageNode(node_id, name, stage, "weights", files["model.safetensors"], ())
        listed = manifest.inputs if folder.name == "model" else {}
        found.append(_Found(node, {"tokenizer": info.tokenizer_hash, **info.parents}, listed))
    return found


def _plain(stage: str, manifest: Manifest) -> _Found:
    """A stage without weights: the tokenizer by its file, others by the hash over all their files."""
    file_hash = manifest.outputs.get("tokenizer.json")
    kind, sha256 = ("file", file_hash) if file_hash else ("files", config_hash(manifest.outputs))
    return _Found(LineageNode(stage, kind_of(stage).title, stage, kind, sha256, ()), {}, manifest.inputs)


def _representative(found: Sequence[_Found], stage: str) -> str:
    return next(item.node.id for item in found if item.node.stage == stage)


def _resolved(item: _Found, holders: Mapping[str, str]) -> LineageNode:
    """The node with its parents; what a manifest lists counts only where the checkpoint does not name it itself."""
    declared = [LineageParent(role, sha, holders.get(sha), True) for role, sha in item.declared.items()]
    known = {parent.node for parent in declared}
    listed = [LineageParent(role, sha, holders.get(sha), False) for role, sha in item.listed.items()]
    parents = (*declared, *(parent for parent in listed if parent.node is None or parent.node not in known))
    return replace(item.node, parents=tuple(parent for parent in parents if parent.node != item.node.id))


def _without_circles(nodes: Sequence[LineageNode]) -> tuple[LineageNode, ...]:
    """The nodes, without parents that descend from them: hashes alone say so where a stage changed no weight, as with
    a value function that learned nothing and its reward model."""
    above: dict[str, set[str]] = {node.id: set() for node in nodes}

    def descends(name: str, other: str) -> bool:
        return name == other or any(descends(parent, other) for parent in above[name])

    kept = []
    for node in nodes:
        parents = tuple(p for p in node.parents if p.node is None or not descends(p.node, node.id))
        above[node.id] = {parent.node for parent in parents if parent.node is not None}
        kept.append(replace(node, parents=parents))
    return tuple(kept)


def _depths(nodes: Sequence[LineageNode]) -> dict[str, int]:
    """The longest path to each node."""
    by_id = {node.id: node for node in nodes}
    known: dict[str, int] = {}

    def depth(node: LineageNode) -> int:
        if node.id not in known:
            above = [by_id[parent.node] for parent in node.parents if parent.node in by_id]
            known[node.id] = 1 + max((depth(parent) for parent in above), default=-1)
        return known[node.id]

    for node in nodes:
        depth(node)
    return known


def _ancestors(nodes: Sequence[LineageNode], depth: Mapping[str, int]) -> dict[str, frozenset[str]]:
    """Everything each node comes from, itself excluded."""
    known: dict[str, frozenset[str]] = {}
    for node in sorted(nodes, key=lambda node: depth[node.id]):
        above = [parent.node for parent in node.parents if parent.node is not None]
        known[node.id] = frozenset(above).union(*(known[name] for name in above))
    return known


def _drawn(node: LineageNode, ancestors: Mapping[str, frozenset[str]]) -> list[LineageParent]:
    """The parents worth an edge: those a checkpoint names, and of the rest those that no other parent implies.

    Every checkpoint names its tokenizer; that counts among the rest.
    """
    kept: dict[str, LineageParent] = {}
    parents = [parent for parent in node.parents if parent.node is not None]
    for parent in parents:
        assert parent.node is not None
        is_implied = any(parent.node in ancestors[other.node] for other in parents if other.node is not None)
        if is_implied and (not parent.declared or parent.role == "tokenizer"):
            continue
        earlier = kept.get(parent.node)
        kept[parent.node] = replace(parent, role=f"{earlier.role}, {parent.role}") if earlier else parent
    return list(kept.values())


def _edge(node: LineageNode, parent: LineageParent, places: Mapping[str, tuple[float, float]]) -> tuple[str, str]:
    """A curve from the parent's right to the child's left, and its role if it skips a column ("" otherwise)."""
    assert parent.node is not None
    start_x, start_y = places[parent.node]
    end_x, end_y = places[node.id]
    start_x += _NODE_WIDTH
    bend = max(14.0, (end_x - start_x) / 2)
    middle_y = (start_y + end_y) / 2
    bow = _bow((start_x, start_y), (end_x, end_y), list(places.values()))
    path = (
        f"M{number(start_x)} {number(start_y)}C{number(start_x + bend)} {number(start_y + bow)} "
        f"{number(end_x - bend)} {number(end_y + bow)} {number(end_x - 1)} {number(end_y)}"
    )
    drawn = f'<path class="edge" d="{path}"><title>{text(f"{parent.role}: {parent.sha256}")}</title></path>'
    if end_x - start_x < _COLUMN or not parent.declared:
        return drawn, ""
    at = f'x="{number((start_x + end_x) / 2)}" y="{number(middle_y + 0.75 * bow + (13 if bow > 0 else -5))}"'
    return drawn, f'<text class="t-role" {at} text-anchor="middle">{text(parent.role)}</text>'


def _bow(start: tuple[float, float], end: tuple[float, float], boxes: Sequence[tuple[float, float]]) -> float:
    """How far the curve's control points must move so that it passes around the boxes between its ends.

    A cubic whose inner control points are moved by b moves by 3b/4 in its middle.
    """
    between = [(x, y) for x, y in boxes if start[0] < x and x + _NODE_WIDTH < end[0]]
    slope = (end[1] - start[1]) / (end[0] - start[0])
    clear = _NODE_HEIGHT / 2 + 20
    if not any(abs(start[1] + slope * (x + _NODE_WIDTH / 2 - start[0]) - y) < clear for x, y in between):
        return 0.0
    upward = end[1] < start[1]
    limit = min(y for _, y in between) - clear if upward else max(y for _, y in between) + clear
    return (limit - (start[1] + end[1]) / 2) / 0.75


def _box(node: LineageNode, place: tuple[float, float]) -> str:
    x, top = place[0], place[1] - _NODE_HEIGHT / 2
    colour, title = stage_colour(node.stage), say.shorten(node.title, 6.9)
    return (
        f"<g><title>{text(f'{node.title}: {node.sha256}')}</title>"
        f'<rect class="node" x="{number(x)}" y="{number(top)}" width="{_NODE_WIDTH}" height="{_NODE_HEIGHT}" rx="6"/>'
        f'<rect style="fill:var({colour})" x="{number(x)}" y="{number(top + 8)}" width="4" '
        f'height="{number(_NODE_HEIGHT - 16)}" rx="2"/>'
        f'<text class="t-strong" x="{number(x + 12)}" y="{number(top + 23)}">{text(title)}</text>'
        f'<text class="t-mono" x="{number(x + 12)}" y="{number(top + 41)}">{text(node.sha256[:10])}</text></g>'
    )


def stage_colour(stage: str) -> str:
    """The CSS variable of a stage's colour; a stage outside the ring has the quiet ink."""
    places = [kind for kind in STAGES if kind.part_of is None]
    kind = kind_of(stage)
    for index, place in enumerate(places):
        if place.name in (kind.name, kind.part_of):
            return f"--c{index}"
    return "--quiet"
