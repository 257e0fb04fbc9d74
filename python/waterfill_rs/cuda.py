"""The layer's decision on a CUDA device: one launch on torch's current stream, which a CUDA graph can capture.

``move_up`` moves routed ids past the shared experts and does nothing else, likewise.

Ids ``[N, K]`` int32 or int64, weights ``[N, K]`` float32 or bfloat16, both contiguous and on one device. The result is
bit for bit that of ``waterfill_rs.torch`` on the CPU, but ids at or above ``physical_experts``, which are an
error there, name no expert here: the slot becomes -1 with weight 0.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from waterfill_rs import _native, nvrtc
from waterfill_rs.tensors import ID_BITS, WEIGHT_BITS

if TYPE_CHECKING:
    from waterfill_rs._native import Ended

__all__ = ["Expander", "expand_topk", "move_up"]

_current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def _cache() -> str | None:
    """Where compiled kernels are kept; None, where every start compiles, for a user without a home."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return str((Path(base) if base else Path.home() / ".cache") / "waterfill-rs")
    except RuntimeError:
        return None


class Expander:
    """One rank's kernel and its state on one device, for one stream at a time.

    Make it before a graph is captured: the first one of its kind compiles. With a board, calls with ``cap_us`` post
    their counts there, and all ranks make as many of them; plans of others are from own counts or given.

    Args:
        device: a CUDA device.
        ids: dtype of the ids.
        weights: dtype of the weights.
        board: where ranks and planner meet. Its experts are ``physical_experts``, or ``ranks`` for loads alone. It stays
            mapped until the process ends, because graphs may.
        redundant: experts beyond one for each logical expert, where plans choose among replicas. Then the board has as many,
            and calls on it are made by ``choose_replicas``.

    Raises:
        ValueError: a shape, rank, dtype or board that does not fit.
        RuntimeError: no driver or NVRTC, or what they refuse.
    """

    def __init__(
        self,
        device: torch.device | str,
        *,
        physical_experts: int,
        ranks: int,
        rank: int,
        top_k: int,
        ids: torch.dtype = torch.int32,
        weights: torch.dtype = torch.float32,
        board: _native.Board | None = None,
        redundant: int = 0,
    ) -> None:
        device = torch.device(device)
        if device.type != "cuda":
            raise ValueError(f"device {device}: give a CUDA device")
        if ids not in ID_BITS or weights not in WEIGHT_BITS:
            raise ValueError(
                f"ids {ids}, weights {weights}: give int32 or int64, float32 or bfloat16"
            )
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.init()  # type: ignore[no-untyped-call]
        self.device, self.ranks, self.top_k = torch.device("cuda", index), ranks, top_k
        self._index, self._ids, self._weights = index, ids, weights
        self._has_board = board is not None
        self._runner = _native.CudaRunner(
            index,
            ranks=ranks,
            experts=physical_experts,
            rank=rank,
            top_k=top_k,
            id_bits=ID_BITS[ids],
            weight_bits=WEIGHT_BITS[weights],
            board=board,
            nvrtc=next(iter(nvrtc.files()), None),
            cache=_cache(),
            redundant=redundant,
        )
        self.experts, self.redundant = physical_experts, redundant
        self._table_words = _native.ReplicaTable.words_of(physical_experts, redundant)
        self._launch = self._runner.unsafe_launch_ptr
        self._move_up = self._runner.unsafe_move_up_ptr
        self._choose = self._runner.unsafe_choose_replicas_ptr
        self.words: int = self._runner.words
        self.max_rows: int = self._runner.max_rows

    def __call__(
        self,
        topk_ids: Tensor,
        topk_weights: Tensor,
        shared_weight: float,
        *,
        quotas: Tensor | None = None,
        cap_us: int | None = None,
        gathered: Tensor | None = None,
        num_token_non_padded: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Widen ids and weights to ``[N, K + 1]``; see ``waterfill_rs.torch.expand_topk``.

        Args:
            quotas: int32 ``[ranks]`` on the device; own ones if they do not add up to the tokens. Not with ``cap_us``.
            cap_us: wait so long for the board's plan. Without it, and without quotas: from own counts.
            gathered: int32 ``[ranks * words]`` on the device, what ``count`` wrote on each rank: posted for all of
                them, on a board of this process alone. Without it, this rank posts its own.
            num_token_non_padded: int32, one element, on the device: rows at or past it are padding.

        Raises:
            ValueError: tensors that do not fit, before anything is written.
        """
        rows = self._check(topk_ids, topk_weights, quotas, num_token_non_padded)
        if cap_us is not None:
            if not self._has_board:
                raise ValueError(f"cap_us {cap_us} without a board: give the Expander one")
            if quotas is not None:
                raise ValueError(
                    f"cap_us {cap_us} and quotas exclude each other: given quotas are not exchanged"
                )
        if gathered is not None:
            if cap_us is None:
                raise ValueError("gathered counts without cap_us: give the longest wait")
            self._refuse("gathered", gathered, torch.int32, (self.ranks * self.words,))
        # Sizes one by one: torch takes a third longer to read a tuple.
        columns = self.top_k + 1
        out_ids = topk_ids.new_empty(rows, columns)
        out_weights = topk_weights.new_empty(rows, columns)
        self._launch(
            topk_ids.data_ptr(),
            topk_weights.data_ptr(),
            out_ids.data_ptr(),
            out_weights.data_ptr(),
            rows,
            shared_weight,
            0 if num_token_non_padded is None else num_token_non_padded.data_ptr(),
            0 if quotas is None else quotas.data_ptr(),
            0 if gathered is None else gathered.data_ptr(),
            cap_us,
            self._stream(),
        )
        return out_ids, out_weights

    def move_up(
        self, topk_ids: Tensor, primaries: Tensor | None = None, logical: Tensor | None = None
    ) -> Tensor:
        """Ids ``[N, K]`` past the shared experts, int64, by one launch; see ``waterfill_rs.torch.move_up``.

        It posts nothing and waits for nobody, may be on any stream, and takes any N; without rows nothing is launched.

        Args:
            primaries: int32 ``[physical_experts]`` on the device, the primary replica of each one's logical expert: ids go out
                by it. A graph reads it at each replay.
            logical: int64 ``[physical_experts]`` on the device, the logical expert of each by the server's own map. An id whose
                primary is of another one goes out by itself.

        Raises:
            ValueError: a tensor that does not fit, before anything is written.
        """
        rows = self._check_ids(topk_ids)
        if primaries is not None:
            self._refuse("primaries", primaries, torch.int32, (self.experts,))
        if logical is not None:
            self._refuse("logical", logical, torch.int64, (self.experts,))
        out = torch.empty_like(topk_ids, dtype=torch.int64)
        self._move_up(
            topk_ids.data_ptr(),
            out.data_ptr(),
            rows * self.top_k,
            0 if primaries is None else primaries.data_ptr(),
            0 if logical is None else logical.data_ptr(),
            self._stream(),
        )
        return out

    def choose_replicas(
        self,
        topk_ids: Tensor,
        table: Tensor,
        logical: Tensor | None = None,
        *,
        moved: bool,
        cap_us: int,
        gathered: Tensor | None = None,
        num_token_non_padded: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """One call on a board with redundant experts: count, post, wait for the plan, and name replicas as it says.

        By one launch, in the place of a call with ``cap_us``. Without a plan, or with one for another map than the table's,
        ids stay as they are.

        Args:
            topk_ids: ``[N, K]`` physical ids.
            table: int32 ``_native.ReplicaTable.words`` of the layer, on the device, read as the launch runs. With 0 for
                the fingerprint no replicas are chosen.
            logical: int64 ``[physical_experts]``, the logical expert of each by the server's own map, on the device: an id
                is only replaced by one of the same logical expert. Without it the table is trusted.
            moved: for a batch whose shared rows are not routed: no tokens and no visits are posted, and ids go out past the
                shared experts, as ``move_up`` moves them.
            cap_us: wait so long for the plan.
            gathered: int32 ``[ranks * words]`` on the device, what ``count`` wrote on each rank; see ``__call__``.
            num_token_non_padded: int32, one element, on the device: rows at or past it are padding. They are not counted and
                have no replica chosen. Their ids are -1, or move up as they are if ``moved``.

        Returns:
            Ids int64 ``[N, K]`` and None if ``moved``. Else ids ``[N, K]`` of the dtype given, and int32 ``[ranks]`` quotas
            for the ``__call__`` that follows; -1 each without a plan, and from own counts there.

        Raises:
            ValueError: tensors that do not fit, no board or no redundant experts, before anything is written.
        """
        rows = self._check_replicas(topk_ids, table, logical, num_token_non_padded)
        if gathered is not None:
            self._refuse("gathered", gathered, torch.int32, (self.ranks * self.words,))
        quotas = None
        if moved:
            out = torch.empty_like(topk_ids, dtype=torch.int64)
        else:
            out, quotas = torch.empty_like(topk_ids), table.new_empty(self.ranks)
        self._choose(
            topk_ids.data_ptr(),
            rows,
            0 if num_token_non_padded is None else num_token_non_padded.data_ptr(),
            out.data_ptr(),
            moved,
            0 if quotas is None else quotas.data_ptr(),
            0,
            table.data_ptr(),
            0 if logical is None else logical.data_ptr(),
            0 if gathered is None else gathered.data_ptr(),
            cap_us,
            self._stream(),
        )
        return out, quotas

    def count(
        self,
        topk_ids: Tensor,
        topk_weights: Tensor | None,
        out: Tensor,
        *,
        num_token_non_padded: Tensor | None = None,
        table: Tensor | None = None,
        moved: bool = False,
    ) -> None:
        """Write what a call with these tensors posts to ``out``, int32 ``[words]`` on the device, by one launch.

        Words are tokens, visits ``[ranks]``, and counts ``[physical_experts]``, or ``[ranks]`` without a board of
        counts per expert. For a collective; see ``gathered``.

        With redundant experts, give the layer's ``table``, and ``moved``, as to ``choose_replicas``; weights are not looked
        at. A *job* is a replicated expert. Words are then tokens, visits ``[ranks]``, loads ``[ranks]``, which are the rows of
        each rank's experts without a job, rows of each job ``[redundant]``, 0 past the table's last, a bit for each expert
        without a job that has rows ``[ceil(physical_experts / 32)]``, and the fingerprint of the table's map. With 0 for the
        fingerprint there is no job.

        Raises:
            ValueError: tensors that do not fit, before anything is written.
        """
        if table is not None:
            rows = self._check_replicas(topk_ids, table, None, num_token_non_padded)
            self._refuse("out", out, torch.int32, (self.words,))
            unpadded = 0 if num_token_non_padded is None else num_token_non_padded.data_ptr()
            ids, words, stream = topk_ids.data_ptr(), out.data_ptr(), self._stream()
            self._choose(ids, rows, unpadded, 0, moved, 0, words, table.data_ptr(), 0, 0, 0, stream)
            return
        if topk_weights is None:
            raise ValueError("counts without topk_weights: give them, or a table of replicas")
        rows = self._check(topk_ids, topk_weights, None, num_token_non_padded)
        self._refuse("out", out, torch.int32, (self.words,))
        self._runner.unsafe_count_ptr(
            topk_ids.data_ptr(),
            topk_weights.data_ptr(),
            rows,
            0 if num_token_non_padded is None else num_token_non_padded.data_ptr(),
            out.data_ptr(),
            self._stream(),
        )

    def tally(self) -> Ended:
        """How calls with given or live quotas ended: ``live``, ``none``, ``timed_out``, ``broken``, ``torn``. Waits for them.

        With redundant experts they are those of ``choose_replicas``.
        """
        return self._runner.tally(self._stream())

    def _stream(self) -> int:
        if _current_stream is not None:
            return int(_current_stream(self._index))
        return torch.cuda.current_stream(self._index).cuda_stream

    def _check(
        self, ids: Tensor, weights: Tensor, quotas: Tensor | None, unpadded: Tensor | None
    ) -> int:
        """The rows, or a ValueError."""
        # In the usual case one comparison each; which one it was is found out afterwards.
        shape = ids.shape
        rows = shape[0] if shape else 0
        if not (
            ids.dtype is self._ids
            and weights.dtype is self._weights
            and ids.get_device() == self._index
            and weights.get_device() == self._index
            and shape == (rows, self.top_k)
            and shape == weights.shape
            and ids.is_contiguous()
            and weights.is_contiguous()
        ):
            self._refuse("topk_ids", ids, self._ids, (rows, self.top_k))
            self._refuse("topk_weights", weights, self._weights, (rows, self.top_k))
        if quotas is not None:
            self._refuse("quotas", quotas, torch.int32, (self.ranks,))
        self._check_unpadded(unpadded)
        return rows

    def _check_ids(self, ids: Tensor) -> int:
        """The rows of ids without weights, or a ValueError."""
        shape = ids.shape
        rows = shape[0] if shape else 0
        if not (
            ids.dtype is self._ids
            and ids.get_device() == self._index
            and shape == (rows, self.top_k)
            and ids.is_contiguous()
        ):
            self._refuse("topk_ids", ids, self._ids, (rows, self.top_k))
        return rows

    def _check_replicas(
        self, ids: Tensor, table: Tensor, logical: Tensor | None, unpadded: Tensor | None
    ) -> int:
        """The rows of a call that chooses replicas, or a ValueError."""
        rows = self._check_ids(ids)
        if self.redundant == 0:
            raise ValueError(
                "a table of replicas, but no redundant experts: give the Expander redundant="
            )
        self._refuse("table", table, torch.int32, (self._table_words,))
        if logical is not None:
            self._refuse("logical", logical, torch.int64, (self.experts,))
        self._check_unpadded(unpadded)
        return rows

    def _check_unpadded(self, unpadded: Tensor | None) -> None:
        if unpadded is not None:
            one = tuple(unpadded.shape) if unpadded.numel() == 1 else (1,)
            self._refuse("num_token_non_padded", unpadded, torch.int32, one)

    def _refuse(
        self, name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]
    ) -> None:
        if tensor.device != self.device:
            raise ValueError(f"{name} is on {tensor.device}: give a tensor on {self.device}")
        if tensor.dtype is not dtype:
            raise ValueError(f"{name} is {tensor.dtype}: give {dtype}")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: give {shape}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}: call .contiguous() first")


def _refuse_shape(topk_ids: Tensor) -> None:
    if topk_ids.dim() != 2 or topk_ids.shape[1] == 0:
        raise ValueError(f"topk_ids has shape {tuple(topk_ids.shape)}: give [N, K], K at least 1")


@functools.cache
def _expander(
    device: torch.device,
    physical_experts: int,
    ranks: int,
    rank: int,
    top_k: int,
    ids: torch.dtype,
    weights: torch.dtype,
) -> Expander:
    return Expander(
        device,
        physical_experts=physical_experts,
        ranks=ranks,
        rank=rank,
        top_k=top_k,
        ids=ids,
        weights=weights,
    )


def expand_topk(
    topk_ids: Tensor,
    topk_weights: Tensor,
    physical_experts: int,
    ranks: int,
    rank: int,
    shared_weight: float,
    quotas: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Widen by one launch, quotas given (int32 ``[ranks]`` on the device) or from own counts.

    The kernel of a shape is made at its first call, which takes two seconds where it was never compiled.
    Under torch.compile it is the operator ``waterfill_rs::expand_topk``.
    """
    if torch.compiler.is_compiling():
        operator = torch.ops.waterfill_rs.expand_topk
        ids, widened = operator(
            topk_ids, topk_weights, physical_experts, ranks, rank, shared_weight, quotas
        )
        return ids, widened
    return _expand(topk_ids, topk_weights, physical_experts, ranks, rank, shared_weight, quotas)


def _expand(
    topk_ids: Tensor,
    topk_weights: Tensor,
    physical_experts: int,
    ranks: int,
    rank: int,
    shared_weight: float,
    quotas: Tensor | None,
) -> tuple[Tensor, Tensor]:
    _refuse_shape(topk_ids)
    expander = _expander(
        topk_ids.device,
        physical_experts,
        ranks,
        rank,
        topk_ids.shape[1],
        topk_ids.dtype,
        topk_weights.dtype,
    )
    return expander(topk_ids, topk_weights, shared_weight, quotas=quotas)


def _like_expanded(
    topk_ids: Tensor,
    topk_weights: Tensor,
    physical_experts: int,
    ranks: int,
    rank: int,
    shared_weight: float,
    quotas: Tensor | None,
) -> tuple[Tensor, Tensor]:
    shape = (topk_ids.shape[0], topk_ids.shape[1] + 1)
    return topk_ids.new_empty(shape), topk_weights.new_empty(shape)


def move_up(topk_ids: Tensor, physical_experts: int, ranks: int) -> Tensor:
    """Move ids up by one launch; the kernel of a shape is made at its first call, as that of ``expand_topk`` is.

    Under torch.compile it is the operator ``waterfill_rs::move_up``.
    """
    if torch.compiler.is_compiling():
        moved: Tensor = torch.ops.waterfill_rs.move_up(topk_ids, physical_experts, ranks)
        return moved
    return _move_up(topk_ids, physical_experts, ranks)


def _move_up(topk_ids: Tensor, physical_experts: int, ranks: int) -> Tensor:
    _refuse_shape(topk_ids)
    # Neither the rank nor the weights matter.
    top_k, ids = topk_ids.shape[1], topk_ids.dtype
    expander = _expander(topk_ids.device, physical_experts, ranks, 0, top_k, ids, torch.float32)
    return expander.move_up(topk_ids)


def _like_moved(topk_ids: Tensor, physical_experts: int, ranks: int) -> Tensor:
    return torch.empty_like(topk_ids, dtype=torch.int64)


_library = torch.library.Library("waterfill_rs", "DEF")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "expand_topk(Tensor topk_ids, Tensor topk_weights, int physical_experts, int ranks, int rank, "
    "float shared_weight, Tensor? quotas) -> (Tensor, Tensor)"
)
_library.define(  # type: ignore[no-untyped-call]
    "move_up(Tensor topk_ids, int physical_experts, int ranks) -> Tensor"
)
_library.impl("expand_topk", _expand, "CUDA")  # type: ignore[no-untyped-call]
_library.impl("move_up", _move_up, "CUDA")  # type: ignore[no-untyped-call]
torch.library.register_fake("waterfill_rs::expand_topk", _like_expanded, lib=_library)
torch.library.register_fake("waterfill_rs::move_up", _like_moved, lib=_library)
