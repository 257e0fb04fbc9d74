"""Around sglang's preparation of a model's MoE routers: the place where Waterfill is known to be asked for.

Here it is decided whether we serve this model, and verified that we do.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from waterfill_rs.config import Config
from waterfill_rs.sglang import eligibility, refusal, sizes, trivial_places, unfusing
from waterfill_rs.sglang.compat import resolve
from waterfill_rs.sglang_versions import ROWS, Seams

if TYPE_CHECKING:
    import torch

    from waterfill_rs.sglang.peers import Peers
    from waterfill_rs.sglang.replicas import Replicas

__all__ = ["Preparation", "lend", "tell_at_preparation"]

logger = logging.getLogger(__name__)

Prepare = Callable[..., Any]

_DETERMINISTIC = "--enable-deterministic-inference: own counts are the same in every run"


def lend(theirs: type, ours: type) -> None:
    """Give our class what sglang's has and ours has not.

    Where sglang's own balancer stays, the class's name is ours all the same, and in dynamic mode its methods call others
    by that name (``WaterfillBalancer._all_reduce_dynamic_rank_load``).
    """
    for name, value in vars(theirs).items():
        if not hasattr(ours, name):
            setattr(ours, name, value)


def tell_at_preparation(reasons: list[str]) -> Prepare:
    """A hook for a sglang that we cannot enter: says so where a model asks for Waterfill."""

    def hook(prepare: Prepare, *args: Any, **kwargs: Any) -> Any:
        if any(_asked(_model(args, kwargs), row.enabled) for row in ROWS):
            refusal.stand_aside(Config.from_environment(os.environ), reasons)
        return prepare(*args, **kwargs)

    return hook


class Preparation:
    """The hook for a sglang that we can enter.

    ``ours``, ``originals``: by sglang's name of the class. sglang's are kept from before the hooks.
    """

    def __init__(
        self, seams: Seams, ours: Mapping[str, type], originals: Mapping[str, type]
    ) -> None:
        self.seams, self.ours, self.originals = seams, ours, originals
        self._serves = False
        self._stood_aside = False

    def hook(self, prepare: Prepare, *args: Any, **kwargs: Any) -> Any:
        """Prepare with our balancers and join the ranks, or with sglang's and say why.

        Raises:
            SystemExit: another plugin is in the way, ranks disagree, or we cannot serve and must.
        """
        routers = _asked(_model(args, kwargs), self.seams.enabled)
        if not routers:  # Off means off: whoever replaced these classes, Waterfill is not in use.
            if not self._serves and not _is_draft(args, kwargs):
                self._tell_if_asked_in_vain()
            return prepare(*args, **kwargs)
        config = Config.from_environment(os.environ)
        arguments = resolve(self.seams.arguments)()
        device = _device(_model(args, kwargs))
        reasons = eligibility.against_machine() or eligibility.against_device(device)
        reasons += eligibility.against_model(arguments, config, self.seams)
        reasons += eligibility.against_routers(_model(args, kwargs))
        # All layers of a model are prepared at once: those of one that was are joined.
        fresh = [router for router in routers if getattr(router, self.seams.holder, None) is None]
        if not fresh and self._has_sglangs(routers):
            return prepare(*args, **kwargs)
        peers: Peers | None = None
        if fresh:
            peers, reasons = self._agree(reasons)
        if reasons:
            return self._stand_aside(config, reasons, prepare, args, kwargs)
        self._verify_hooks()
        result = prepare(*args, **kwargs)
        balancers = self._verify_routers(routers)
        if fresh and (
            reasons := self._against_sizes(routers, arguments, device, args, kwargs, peers)
        ):
            for router in fresh:
                setattr(router, self.seams.holder, None)
            return self._stand_aside(config, reasons, prepare, args, kwargs)
        if any(balancer.exchange is None for balancer in balancers):
            share = unfusing.Share(self.seams, config, arguments)
            dtype = getattr(_model_config(args, kwargs), "dtype", None)
            where = share.decide(_model(args, kwargs), routers, dtype, device, peers)
            alone = _DETERMINISTIC if eligibility.is_deterministic(arguments) else None
            draft = _is_draft(args, kwargs) or any(getattr(r, "is_draft", False) for r in routers)
            replicas = self._replicas(routers, config, arguments, alone, draft)
            self._join(balancers, config, peers, alone, device, where, replicas)
            trivial_places.tell(arguments, balancers[0].rank, self.seams)
        return result

    def _has_sglangs(self, routers: list[Any]) -> bool:
        """Were they prepared by sglang's own balancer, because we stood aside?"""
        original = self.originals[self.seams.balancer]
        holders = [getattr(router, self.seams.holder, None) for router in routers]
        return self._stood_aside and all(type(holder) is original for holder in holders)

    def _stand_aside(
        self,
        config: Config,
        reasons: list[str],
        prepare: Prepare,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Say why, and prepare with sglang's own.

        Raises:
            SystemExit: we were required.
        """
        refusal.stand_aside(config, reasons)
        self._stood_aside = True
        if not dist.is_initialized() or dist.get_rank() == 0:
            trivial_places.tell_of_spread()
        with self._sglangs_balancer():
            return prepare(*args, **kwargs)

    def _against_sizes(
        self,
        routers: list[Any],
        arguments: Any,
        device: torch.device,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        peers: Peers | None,
    ) -> list[str]:
        """What in the sizes of any rank's layers keeps us from serving them; all ranks come to the same."""
        balancers = [getattr(router, self.seams.holder) for router in routers]
        tokens = sizes.most_tokens(arguments, balancers[0].world_size)
        reasons = sizes.against_sizes(_model(args, kwargs), routers, balancers, device, tokens)
        return peers.agree(reasons, "fits") if peers else reasons

    def _replicas(
        self, routers: list[Any], config: Config, arguments: Any, alone: str | None, draft: bool
    ) -> Replicas:
        from waterfill_rs.sglang.replicas import Replicas

        ranks = getattr(routers[0], self.seams.holder).world_size
        top_k, tokens = sizes.routed_experts(routers[0]), sizes.most_tokens(arguments, ranks)
        moves = eligibility.moves_experts(arguments)
        return Replicas(self.seams, config, top_k, tokens, alone=alone, draft=draft, moves=moves)

    def _tell_if_asked_in_vain(self) -> None:
        try:
            arguments = resolve(self.seams.arguments)()
        except Exception:  # Not a server's: and then nothing of ours may fail here.
            return
        if getattr(arguments, self.seams.switch, False):
            config = Config.from_environment(os.environ)
            refusal.no_layer(config, arguments, self.seams)

    def _agree(self, reasons: list[str]) -> tuple[Peers | None, list[str]]:
        """The other ranks, and what keeps any rank from serving: one that stands aside must leave nobody waiting."""
        from waterfill_rs.sglang.peers import peers_of_next_model

        peers = peers_of_next_model(self.seams)
        return peers, peers.agree(reasons) if peers else reasons

    @contextlib.contextmanager
    def _sglangs_balancer(self) -> Iterator[None]:
        """Its preparation imports the class anew each time."""
        module, _, name = self.seams.balancer.rpartition(".")
        home = importlib.import_module(module)
        replaced, original = getattr(home, name), self.originals[self.seams.balancer]
        lend(original, replaced)
        setattr(home, name, original)
        try:
            yield
        finally:
            setattr(home, name, replaced)

    def _verify_hooks(self) -> None:
        missing = [
            f"{name} is not waterfill-rs's after registration"
            for name, ours in self.ours.items()
            if resolve(name) is not ours
        ]
        if missing:
            refusal.stop(missing)

    def _verify_routers(self, routers: list[Any]) -> list[Any]:
        """Their balancers, all ours."""
        ours = self.ours[self.seams.balancer]
        balancers = [getattr(router, self.seams.holder, None) for router in routers]
        others = [
            f"{type(router).__name__} with {type(balancer)}"
            for router, balancer in zip(routers, balancers, strict=True)
            if not isinstance(balancer, ours)
        ]
        if others:
            refusal.stop(
                [
                    f"{len(others)} of {len(routers)} MoE layers are not balanced by waterfill-rs: {sorted(set(others))}"
                ]
            )
        return balancers

    def _join(
        self,
        balancers: list[Any],
        config: Config,
        peers: Peers | None,
        alone: str | None,
        device: torch.device,
        where: str,
        replicas: Replicas,
    ) -> None:
        """Join layers that were just prepared to their peers, and say how.

        ``alone``: why own counts are taken, if they are. ``where``: shared experts run. ``replicas``: who chooses them.
        """
        from waterfill_rs.sglang import recorder
        from waterfill_rs.sglang.join import connect

        fresh = [balancer for balancer in balancers if balancer.exchange is None]
        if alone and config.exchange in ("board", "group"):
            logger.warning(
                "waterfill-rs: exchange solo, and not %s, because of %s",
                config.exchange,
                _DETERMINISTIC,
            )
        try:
            tables = replicas.tables(fresh, device, peers)
            exchange = connect(fresh, config, peers, device, alone, tables)
            chosen = replicas.follow(exchange, fresh)
        except (OSError, RuntimeError, ValueError) as error:
            refusal.stop([str(error)])
        recorder.shared_slots_come()
        self._serves = True
        # Ranks of a board are of one node: one line for them all.
        told = exchange.name != "board" or fresh[0].rank == 0
        logger.log(
            logging.INFO if told else logging.DEBUG,
            "waterfill-rs active: %d MoE layers on %s, exchange %s, because %s%s; shared experts: %s%s",
            len(fresh),
            device,
            exchange.name,
            exchange.reason,
            _waits(config, device) if exchange.name == "board" else "",
            where,
            f"; replicas: {chosen}" if chosen else "",
        )


def _waits(config: Config, device: torch.device) -> str:
    """What a layer waits for, in words."""
    board = config.board
    by_itself = "inline" if device.type == "cpu" else "park"
    return (
        f"; a layer waits for the counts of every rank that lives, {board.patience_us / 1e6:g} s at most, planner "
        f"{by_itself if board.pace == 'auto' else board.pace}; how calls end: waterfill-rs status"
    )


def _model(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Given by name, or the attribute of the runner whose method this is."""
    return kwargs["model"] if "model" in kwargs else args[0].model


def _model_config(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return kwargs.get("model_config") or getattr(next(iter(args), None), "model_config", None)


def _is_draft(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """A draft model often has no MoE layer, and the target's are what Waterfill is for."""
    return bool(getattr(_model_config(args, kwargs), "is_draft_model", False))


def _asked(model: Any, enabled: str) -> list[Any]:
    return [module for module in model.modules() if getattr(module, enabled, False)]


def _device(model: Any) -> torch.device:
    """Where the model's layers run; one without weights is where sglang would put it."""
    import torch

    weights = itertools.chain(model.parameters(), model.buffers())
    devices: list[torch.device] = list(dict.fromkeys(weight.device for weight in weights))
    # Weights that sglang offloads are on the CPU between their uses, or nowhere.
    running = [device for device in devices if device.type not in ("cpu", "meta")]
    default = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return next(iter((*running, *devices)), default)
