"""Trees of tensors as vectors: the parameters of a model are one vector of n numbers, K tangents a matrix (n, K)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

__all__ = ["Layout"]


@dataclass(frozen=True)
class Layout:
    """Where the leaves of a tree lie in its vector: one behind the other, each row by row.

    Attributes:
        spec: the tree.
        shapes: of its leaves.
    """

    spec: TreeSpec
    shapes: tuple[torch.Size, ...]

    @classmethod
    def of(cls, params: Any) -> Layout:
        """The layout of a tree of floating-point tensors.

        Raises:
            TypeError: a leaf is not a floating-point tensor.
            ValueError: there are no leaves.
        """
        leaves, spec = tree_flatten(params)
        if not leaves:
            raise ValueError("params holds no tensors; expected a tensor, or a dictionary or list of them")
        for leaf in leaves:
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                kind = str(leaf.dtype) if isinstance(leaf, Tensor) else type(leaf).__name__
                raise TypeError(f"params must be floating-point tensors; got {kind} among them")
        return cls(spec, tuple(leaf.shape for leaf in leaves))

    @property
    def sizes(self) -> list[int]:
        """Numbers of each leaf."""
        return [math.prod(shape) for shape in self.shapes]

    @property
    def size(self) -> int:
        """n, the numbers of all leaves."""
        return sum(self.sizes)

    def flatten(self, tree: Any) -> Tensor:
        """(n,) of a tree."""
        return torch.cat([leaf.reshape(-1) for leaf in tree_flatten(tree)[0]])

    def unflatten(self, vector: Tensor) -> Any:
        """The tree of (n,)."""
        leaves = [part.view(shape) for part, shape in zip(vector.split(self.sizes), self.shapes, strict=True)]
        return tree_unflatten(leaves, self.spec)

    def flatten_rows(self, tree: Any) -> Tensor:
        """(K, n) of a tree whose leaves have K in front."""
        return torch.cat([leaf.flatten(1) if leaf.dim() > 1 else leaf[:, None] for leaf in tree_flatten(tree)[0]], 1)

    def unflatten_rows(self, rows: Tensor) -> Any:
        """The tree of (K, n), with K in front of all leaves."""
        parts = rows.split(self.sizes, dim=1)
        return tree_unflatten([p.reshape(-1, *s) for p, s in zip(parts, self.shapes, strict=True)], self.spec)

    def rows_of(self, vectors: Any) -> tuple[Tensor, str]:
        """Vectors in any form as rows (K, n), and the form, for `in_form`.

        Args:
            vectors: a tensor (n,) or (n, K), or a tree like params, maybe with K in front of all leaves.

        Raises:
            ValueError: the vectors do not fit.
        """
        if isinstance(vectors, Tensor) and vectors.dim() in (1, 2) and vectors.shape[0] == self.size:
            return (vectors[None], "vector") if vectors.dim() == 1 else (vectors.T, "columns")
        leaves, spec = tree_flatten(vectors)
        fits = spec == self.spec and all(isinstance(leaf, Tensor) for leaf in leaves)
        if fits and _shapes(leaves) == self.shapes:
            return self.flatten(vectors)[None], "tree"
        counts = {leaf.shape[0] for leaf in leaves if leaf.dim() > 0} if fits else set()
        if len(counts) == 1 and _shapes([leaf[0] for leaf in leaves]) == self.shapes:
            return self.flatten_rows(vectors), "trees"
        got = f"the shapes {[tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor)][:4]}"
        if isinstance(vectors, Tensor):
            got = f"the shape {tuple(vectors.shape)}"
        raise ValueError(
            f"vectors must have the shape ({self.size},) or ({self.size}, K), or be a tree like params, whose leaves "
            f"may have K in front; got {got}"
        )

    def in_form(self, rows: Tensor, form: str) -> Any:
        """Rows (K, n) in the form that `rows_of` found."""
        if form == "vector":
            return rows[0]
        if form == "columns":
            return rows.T
        return self.unflatten(rows[0]) if form == "tree" else self.unflatten_rows(rows)


def _shapes(leaves: Sequence[Tensor]) -> tuple[torch.Size, ...]:
    return tuple(leaf.shape for leaf in leaves)
