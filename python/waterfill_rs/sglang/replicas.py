"""Who chooses the replicas of a model's redundant experts: sglang, or live plans by tables of sglang's own map.

The map is ``physical_to_logical_map`` of sglang's ``ExpertLocationMetadata``, which a rebalance changes in place. The
tables follow in the same pass.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from waterfill_rs.config import REPLICAS_VARIABLE, Config
from waterfill_rs.exchange.replicas import ReplicaTables
from waterfill_rs.sglang import compat, loaded_hooks, primaries_first, refusal, sizes
from waterfill_rs.sglang.compat import resolve
from waterfill_rs.sglang.panics import panics_are_errors
from waterfill_rs.sglang_versions import Seams

if TYPE_CHECKING:
    from waterfill_rs.exchange.interface import Exchange
    from waterfill_rs.exchange.member import Member
    from waterfill_rs.sglang.balancer import WaterfillBalancer
    from waterfill_rs.sglang.peers import Peers

__all__ = ["Replicas", "follow_update"]

logger = logging.getLogger(__name__)

_followed: list[tuple[Any, ReplicaTables]] = []
"""sglang's metadata, and the tables made of it; the target model's alone, so one pair a process at most."""


class Replicas:
    """The decision for one model, all ranks alike.

    Args:
        top_k: routed experts of a token.
        tokens: of a prefill in a rank's layer, at most.
        alone: why own counts are to be taken, if they are.
        draft: its layers have no row in sglang's map, or one of the target model's.
        moves: whether the server moves experts while it serves.
    """

    def __init__(
        self,
        seams: Seams,
        config: Config,
        top_k: int,
        tokens: int,
        *,
        alone: str | None = None,
        draft: bool = False,
        moves: bool = False,
    ) -> None:
        self._seams, self._asked, self._alone, self._draft = seams, config.replicas, alone, draft
        self._top_k, self._tokens, self._moves = top_k, tokens, moves
        self._metadata: Any = None
        self._layers: list[int] = []
        self._reasons: list[str] = []
        self._against_order: list[str] = []

    @property
    def _redundant(self) -> int:
        if self._metadata is None:
            return 0
        return int(self._metadata.num_physical_experts - self._metadata.num_logical_experts)

    @panics_are_errors
    def tables(
        self, balancers: Sequence[WaterfillBalancer], device: torch.device, peers: Peers | None
    ) -> ReplicaTables | None:
        """The tables that this model's exchange is to choose by, or None where sglang chooses.

        Raises:
            SystemExit: live plans were asked for by name and cannot be had.
        """
        self._metadata = _in_force(self._seams)
        if self._metadata is not None:
            self._against_order = primaries_first.against_hook(self._seams)
        tables, self._reasons = self._own(balancers, device)
        if peers is not None:
            answer = "" if tables is None else self._answer(tables)
            self._reasons = peers.agree(self._reasons, "replicas", answer)
        if self._reasons:
            self._stop_if_asked()
            return None
        return tables

    def follow(self, exchange: Exchange, balancers: Sequence[WaterfillBalancer]) -> str:
        """Have the tables follow sglang's map, if the exchange has taken them; who chooses, in words.

        Raises:
            SystemExit: as above, where the exchange is one without live counts.
        """
        tables = exchange.replicas
        if tables is None:
            if not self._reasons:
                self._reasons = [f"exchange {exchange.name} has own counts alone"]
                self._stop_if_asked()
            return self._why_not()
        _followed.append((self._metadata, tables))
        decode = "" if self._asked == "live" else self._decode_by_primaries(balancers, tables)
        replicated = {tables.replicated[layer] for layer in self._layers}
        span = "-".join(map(str, sorted({min(replicated), max(replicated)})))
        return f"live{decode}, {tables.redundant} redundant experts, {span} replicated"

    def _decode_by_primaries(
        self, balancers: Sequence[WaterfillBalancer], tables: ReplicaTables
    ) -> str:
        """Have steps in which nobody prefills take primary replicas, where shared experts are unfused then; in words.

        In decode an expert's weights take longer than its rows, so each is to run on one replica. Which one matters little:
        nearly all experts have rows, and an exchange of counts takes longer than it gains.
        """
        unfused = [balancer for balancer in balancers if balancer.overlap is not None]
        for balancer in unfused:
            overlap = balancer.overlap
            assert overlap is not None
            overlap.decodes_by_primaries = True
            if self._narrows:
                overlap.primary_slots = tables.keep_first_primaries(balancer.layer_id)
        if self._moves and self._narrows:
            primaries_first.keep(self._metadata, tables, balancers[0].rank)
        if self._against_order and len(tables.kept_first) < len(unfused):
            logger.log(
                logging.INFO if balancers[0].rank == 0 else logging.DEBUG,
                "waterfill-rs: primary replicas are not put first, because %s",
                "; ".join(self._against_order),
            )
        if not unfused:
            return ""
        left_out = f"groups left out in {len(tables.kept_first)} of {len(unfused)} layers"
        return f" in prefill, primary ones in decode with {left_out}"

    @property
    def _narrows(self) -> bool:
        """May GEMMs in decode leave groups out? Not where a later map may have other primary replicas first."""
        return not (self._moves and self._against_order)

    def _own(
        self, balancers: Sequence[WaterfillBalancer], device: torch.device
    ) -> tuple[ReplicaTables | None, list[str]]:
        """This rank's tables, or what keeps it from them."""
        member = balancers[0].member
        if reasons := self._against(member, device):
            return None, reasons
        metadata = self._metadata
        tables = ReplicaTables(
            member.ranks,
            self._redundant,
            metadata.physical_to_logical_map_cpu,
            metadata.physical_to_logical_map if device.type == "cuda" else None,
        )
        named = {balancer.layer_id for balancer in balancers if balancer.layer_id is not None}
        self._layers = sorted(layer for layer in named if layer < tables.layers)
        if not self._layers:
            return None, [f"sglang's map of {tables.layers} layers has none of this model's"]
        refused = [f"layer {i}: {tables.refused[i]}" for i in self._layers if i in tables.refused]
        refused = refused or _without_weights(metadata, member)
        return (None, refused) if refused else (tables, [])

    def _against(self, member: Member, device: torch.device) -> list[str]:
        """What keeps a model's ranks from live plans; the first, because others follow from it."""
        if self._asked == "sglang":
            return [f"{REPLICAS_VARIABLE}=sglang"]
        if reasons := compat.against_replicas(self._seams):
            return reasons
        if self._metadata is None:
            return ["there are no redundant experts: give --ep-num-redundant-experts"]
        if self._draft:
            return ["this is a draft model, whose experts stay where they are"]
        if self._alone is not None:
            return [self._alone]
        found = self._metadata.num_physical_experts
        if found != member.experts:
            return [
                f"sglang's map is of {found} physical experts, and Waterfill counts {member.experts}"
            ]
        update = self._seams.location_update
        if not loaded_hooks.found().get(update):
            return [f"{update} is not waterfill-rs's after registration"]
        if device.type != "cuda":
            return []
        return _against_map(self._metadata.physical_to_logical_map, device) or (
            sizes.against_kernel(
                device,
                member.ranks,
                member.experts,
                member.rank,
                self._top_k,
                self._tokens,
                self._redundant,
            )
        )

    def _answer(self, tables: ReplicaTables) -> str:
        """The same on two ranks if their maps are, and if both take live plans and leave groups out in the same steps."""
        prints = b"".join(one.to_bytes(4, "little") for one in tables.fingerprints)
        return (
            f"its map of experts has fingerprint {zlib.crc32(prints):08x}, its setting is {self._asked}, and its decode may "
            f"leave groups out: {self._narrows}; give all ranks the same placement and the same settings"
        )

    def _stop_if_asked(self) -> None:
        """A draft model's are sglang's to choose, whatever was asked for."""
        if self._asked == "live" and not self._draft:
            refusal.stop([f"replicas cannot be chosen live: {r}" for r in self._reasons])

    def _why_not(self) -> str:
        """Nothing, where there is nothing to choose."""
        return f"as sglang chooses, because {'; '.join(self._reasons)}" if self._redundant else ""


def _in_force(seams: Seams) -> Any:
    """sglang's metadata; None where it has none, has no redundant experts, or is another sglang."""
    try:
        found = resolve(f"{seams.expert_location}.get_global_expert_location_metadata")()
        return found if found.num_physical_experts > found.num_logical_experts else None
    except (AssertionError, AttributeError, ImportError):
        return None


def _without_weights(metadata: Any, member: Member) -> list[str]:
    """The first of this rank's slots that sglang loads no weights into: of several replicas on a rank it may list one.

    ``primaries_first.with_twins`` lists all, where the hook is in place.
    """
    mapping: torch.Tensor = metadata.physical_to_logical_map_cpu
    each = member.experts // member.ranks
    own = torch.arange(member.rank * each, (member.rank + 1) * each)
    logical = mapping[:, own].long()
    listed = metadata.logical_to_all_physical_map.cpu()[
        torch.arange(len(mapping))[:, None], logical
    ]
    missing = (~(listed == own[:, None]).any(dim=2)).nonzero().tolist()
    return [
        f"expert {int(logical[layer, slot])} stands twice on rank {member.rank} in layer {layer}, and sglang loads the weights "
        "of one of them: make a placement with waterfill-rs place"
        for layer, slot in missing[:1]
    ]


def _against_map(logical: torch.Tensor, device: torch.device) -> list[str]:
    """What keeps a kernel on this device from reading sglang's map."""
    fits = logical.device == device and logical.dtype is torch.int64 and logical.is_contiguous()
    if fits:
        return []
    return [
        f"sglang's map is {logical.dtype} on {logical.device} with strides {logical.stride()}, and the kernel reads "
        f"contiguous torch.int64 on {device}"
    ]


@panics_are_errors
def follow_update(
    _: Any, metadata: Any, other: Any = None, update_layer_ids: Sequence[int] = (), **__: Any
) -> None:
    """For after ``ExpertLocationMetadata.update``: tables of the layers that it changed are made anew.

    sglang makes it on every rank in the same pass, and not while layers run. The planner knows the new maps first, and the
    device's tables change on the stream that sglang changes its own on. Calls whose ranks are not all through keep the
    replicas that sglang chose: fingerprints differ.
    """
    for held, tables in _followed:
        if held is metadata:
            layers = [int(layer) for layer in update_layer_ids]
            tables.renew(layers, metadata.physical_to_logical_map_cpu)
            for layer in layers:
                if layer in tables.refused:
                    logger.warning(
                        "waterfill-rs: sglang chooses the replicas of layer %d from now on: %s",
                        layer,
                        tables.refused[layer],
                    )
