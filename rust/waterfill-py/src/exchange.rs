//! One rank's end of each exchange on the CPU: a call's routed rows in, the expanded ones out.

use std::sync::Arc;
use std::time::Duration;

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use waterfill_board::{BoardPlanner, Outcome, Port, Posted, Segment};
use waterfill_core::{Expander, Id, OwnCounts, OwnPlanner, Placement, ReplicaAssigner, move_up};

use crate::board::{PyBoard, planner, tally_dict};
use crate::error::{board_guarded, guarded, refused};
use crate::plan::PyCostModel;
use crate::replicas::PyReplicaTable;
use crate::tensors::{Call, Expanded, Ids, Weights, array_mut, with_ids, with_rows};

pub fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PySolo>()?;
    module.add_class::<PyPort>()
}

/// A rank that knows its own counts only.
#[pyclass(name = "Solo")]
struct PySolo {
    expander: Expander,
    planner: OwnPlanner,
    calls: u64,
}

#[pymethods]
impl PySolo {
    /// The end of `rank`, which plans with this cost model.
    #[new]
    fn new(ranks: usize, experts: usize, rank: usize, cost_model: &PyCostModel) -> PyResult<Self> {
        guarded(|| {
            let placement = Placement::contiguous(ranks, experts)?;
            let expander = Expander::new(placement, cost_model.inner.clone(), rank)?;
            Ok(Self { expander, planner: OwnPlanner::new(), calls: 0 })
        })
    }

    /// One call: count, plan from own counts, and write ids and weights `[rows, top_k + 1]` at `out`.
    fn unsafe_expand_ptr(
        &mut self,
        py: Python<'_>,
        ids: Ids,
        weights: Weights,
        out: Expanded,
        shared_weight: f32,
    ) -> PyResult<()> {
        let call = Call { ids, weights, out };
        py.detach(|| {
            with_rows!(call, I, W => {
                // SAFETY: `waterfill_rs.exchange` gives live contiguous arrays of these shapes and types, the outputs
                // freshly made and shared with nobody. Its caller waits for this call, and nobody else writes the inputs.
                let (routed, out) = unsafe { call.rows::<I, W>() }?;
                guarded(|| {
                    self.expander.expand(routed, shared_weight, out, |own, quotas| {
                        self.calls += 1;
                        self.planner.plan(own, quotas)
                    })
                })
            })
        })
    }

    /// Quotas `[ranks]` of the last call.
    #[getter]
    fn quotas(&self) -> Vec<u32> {
        self.expander.quotas().to_vec()
    }

    /// Calls so far.
    #[getter]
    fn calls(&self) -> u64 {
        self.calls
    }
}

/// A rank's end of a board; with the planner in its waits where no thread has it.
#[pyclass(name = "Port")]
struct PyPort {
    inner: Port<Arc<Segment>>,
    planner: Option<BoardPlanner<Arc<Segment>>>,
    expander: Expander,
    placement: Placement,
    replicas: ReplicaAssigner,
    /// `[rows, top_k]` ids with replicas chosen, before they are moved up.
    chosen: Vec<i64>,
    process: u32,
}

#[pymethods]
impl PyPort {
    /// The end of `rank`; with `plans_patience_us` it plans for all while it waits.
    #[new]
    #[pyo3(signature = (board, rank, cost_model, *, plans_patience_us=None))]
    fn new(
        board: &PyBoard,
        rank: usize,
        cost_model: &PyCostModel,
        plans_patience_us: Option<u64>,
    ) -> PyResult<Self> {
        board_guarded(|| {
            let (region, cost) = (Arc::clone(&board.inner), &cost_model.inner);
            let placement = Placement::contiguous(board.shape.ranks, board.shape.experts)?;
            Ok(Self {
                expander: Expander::new(placement.clone(), cost.clone(), rank)?,
                placement,
                replicas: ReplicaAssigner::new(),
                chosen: Vec::new(),
                inner: Port::new(region, board.shape, cost.clone(), rank)?,
                planner: plans_patience_us.map(|us| planner(board, cost_model, us)).transpose()?,
                process: std::process::id(),
            })
        })
    }

    /// One call: count, post, wait at most `cap_us` for the quotas, and write ids and weights `[rows, top_k + 1]` at `out`.
    /// Gives how the call ended.
    #[allow(clippy::too_many_arguments)] // One caller, `waterfill_rs.exchange`, once a layer: no objects in between.
    fn unsafe_expand_ptr(
        &mut self,
        py: Python<'_>,
        ids: Ids,
        weights: Weights,
        out: Expanded,
        shared_weight: f32,
        cap_us: u64,
    ) -> PyResult<&'static str> {
        self.check_process()?;
        let (call, cap) = (Call { ids, weights, out }, Duration::from_micros(cap_us));
        // A wait for peers: other threads may run meanwhile.
        py.detach(|| {
            with_rows!(call, I, W => {
                // SAFETY: `waterfill_rs.exchange` gives live contiguous arrays of these shapes and types, the outputs
                // freshly made and shared with nobody. Its caller waits for this call, and nobody else writes the inputs.
                let (routed, out) = unsafe { call.rows::<I, W>() }?;
                let Self { inner, planner, expander, .. } = self;
                let learn = |own: &OwnCounts, quotas: &mut [u32]| {
                    exchange(inner, planner.as_mut(), own, cap, quotas)
                };
                board_guarded(|| expander.expand(routed, shared_weight, out, learn)).map(Outcome::name)
            })
        })
    }

    /// One call on a board with redundant experts: count, post, wait at most `cap_us` for the plan, and name replicas as it
    /// says. Ids `[rows, top_k]` go to `out`: of the given type, or, `moved` up past the shared experts, int64. Moved ids are
    /// of a batch whose shared rows are not routed. Gives how the call ended.
    fn unsafe_choose_ptr(
        &mut self,
        py: Python<'_>,
        ids: Ids,
        out: usize,
        cap_us: u64,
        table: Option<&PyReplicaTable>,
        moved: bool,
    ) -> PyResult<&'static str> {
        self.check_process()?;
        let cap = Duration::from_micros(cap_us);
        let table = table.map(|table| Arc::clone(&table.inner));
        py.detach(|| {
            board_guarded(|| self.inner.set_table(table.as_ref()))?;
            with_ids!(ids, I => {
                // SAFETY: as in `unsafe_expand_ptr`.
                let values = unsafe { ids.get::<I>() }?;
                // SAFETY: as in `unsafe_expand_ptr`: `[rows, top_k]`, int64 if moved, else of the ids' type.
                let out = unsafe { Chosen::<I>::at(out, ids.rows * ids.top_k, moved) }?;
                let Self { inner, planner, expander, replicas, chosen, placement, .. } = self;
                let learn = |own: &OwnCounts, quotas: &mut [u32]| {
                    exchange(inner, planner.as_mut(), own, cap, quotas)
                };
                let outcome =
                    board_guarded(|| expander.learn(values, ids.top_k, !moved, learn))?;
                let plan = table.as_deref().zip(inner.replica_quotas());
                guarded(|| match out {
                    Chosen::MovedUp(out) => {
                        widen(values, chosen);
                        plan.map_or(Ok(()), |(table, quotas)| {
                            replicas.assign(table, quotas, chosen, ids.top_k)
                        })?;
                        move_up(placement, chosen, ids.top_k, out)
                    }
                    Chosen::AsGiven(out) => {
                        out.copy_from_slice(values);
                        plan.map_or(Ok(()), |(table, quotas)| {
                            replicas.assign(table, quotas, out, ids.top_k)
                        })
                    }
                })?;
                Ok(outcome.name())
            })
        })
    }

    /// The planner's map of `layer` from now on, where this rank plans in its waits.
    fn set_map(&mut self, layer: usize, table: &PyReplicaTable) -> PyResult<()> {
        let planner = self.planner.as_mut();
        let planner = planner.ok_or_else(|| refused("this port has no planner".into()))?;
        planner.set_map(layer, Arc::clone(&table.inner));
        Ok(())
    }

    /// Quotas `[ranks]` of the last call.
    #[getter]
    fn quotas(&self) -> Vec<u32> {
        self.expander.quotas().to_vec()
    }

    /// How the calls so far ended.
    fn tally<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        tally_dict(py, self.inner.tally())
    }

    /// Why the others cannot see whether this process lives, if they can't.
    #[getter]
    fn unwatched(&self) -> Option<String> {
        let planner = self.planner.as_ref().and_then(BoardPlanner::unwatched);
        self.inner.unwatched().or(planner).map(ToString::to_string)
    }
}

impl PyPort {
    /// Two processes must not write one rank's words.
    fn check_process(&self) -> PyResult<()> {
        let now = std::process::id();
        if now == self.process {
            return Ok(());
        }
        Err(PyRuntimeError::new_err(format!(
            "process {now} is a fork of {}, which is this rank on the board: start rank processes by \
             spawn, and use the board only there",
            self.process
        )))
    }
}

/// Where ids with replicas chosen go.
enum Chosen<'a, I> {
    MovedUp(&'a mut [i64]),
    AsGiven(&'a mut [I]),
}

impl<I> Chosen<'_, I> {
    /// # Safety
    /// As [`array_mut`], of 64-bit integers if `moved`, else of `I`.
    unsafe fn at(address: usize, length: usize, moved: bool) -> PyResult<Self> {
        // SAFETY: the caller's promise, passed on.
        unsafe {
            Ok(if moved {
                Self::MovedUp(array_mut("out", address, length)?)
            } else {
                Self::AsGiven(array_mut("out", address, length)?)
            })
        }
    }
}

/// The ids in 64 bits, in place of what was there.
fn widen<I: Id>(ids: &[I], out: &mut Vec<i64>) {
    out.clear();
    out.extend(ids.iter().map(|&id| -> i64 { id.into() }));
}

/// Post own counts and take the quotas; polls the planner meanwhile, if this rank has it.
fn exchange(
    port: &mut Port<Arc<Segment>>,
    mut planner: Option<&mut BoardPlanner<Arc<Segment>>>,
    own: &OwnCounts,
    cap: Duration,
    quotas: &mut [u32],
) -> waterfill_board::Result<Outcome> {
    let posted = Posted { tokens: own.tokens, visits: own.visits, counts: own.routed };
    port.post(posted)?;
    let meanwhile = || {
        planner.as_mut().map(|planner| planner.poll());
    };
    port.finish_with(posted, cap, quotas, meanwhile)
}
