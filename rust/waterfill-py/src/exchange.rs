//! One rank's end of each exchange: its tokens' ids in, its quotas out.

use std::sync::Arc;
use std::time::Duration;

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use waterfill_board::{BoardPlanner, Outcome, Port, Posted, Segment};
use waterfill_core::{CostModel, Error, Id, OwnCounts, OwnPlanner, Placement, count};

use crate::board::{PyBoard, planner, tally_dict};
use crate::error::{board_guarded, guarded};
use crate::plan::PyCostModel;
use crate::tensors::{Ids, unknown_bits};

pub fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PySolo>()?;
    module.add_class::<PyPort>()
}

/// What one rank posts: counted from its ids into memory that is reused.
struct Counted {
    placement: Placement,
    tokens: u32,
    visits: Vec<u32>,
    counts: Vec<u32>,
}

impl Counted {
    fn new(ranks: usize, experts: usize) -> waterfill_core::Result<Self> {
        let placement = Placement::contiguous(ranks, experts)?;
        Ok(Self { placement, tokens: 0, visits: vec![0; ranks], counts: vec![0; experts] })
    }

    /// # Safety
    /// As [`Ids::get`].
    unsafe fn count(&mut self, ids: Ids, bits: usize) -> PyResult<()> {
        // SAFETY: the caller's promise, passed on.
        unsafe {
            match bits {
                32 => self.count_ids(ids.get::<i32>()?, ids.top_k),
                64 => self.count_ids(ids.get::<i64>()?, ids.top_k),
                _ => Err(unknown_bits("topk_ids", bits, "int32 or int64")),
            }
        }
    }

    fn count_ids<I: Id>(&mut self, ids: &[I], top_k: usize) -> PyResult<()> {
        guarded(|| {
            self.tokens = count(&self.placement, ids, top_k, &mut self.counts, &mut self.visits)?;
            Ok(())
        })
    }

    fn own<'a>(&'a self, cost: &'a CostModel, source: usize) -> OwnCounts<'a> {
        let (placement, routed, visits, tokens) =
            (&self.placement, &self.counts, &self.visits, self.tokens);
        OwnCounts { placement, cost, source, routed, visits, tokens }
    }
}

fn check_rank(rank: usize, ranks: usize) -> waterfill_core::Result<()> {
    if rank < ranks { Ok(()) } else { Err(Error::Rank { name: "rank", rank: rank as i64, ranks }) }
}

/// A rank on its own.
#[pyclass(name = "Solo")]
struct PySolo {
    counted: Counted,
    cost: CostModel,
    rank: usize,
    planner: OwnPlanner,
    calls: u64,
}

#[pymethods]
impl PySolo {
    #[new]
    fn new(ranks: usize, experts: usize, rank: usize, cost_model: &PyCostModel) -> PyResult<Self> {
        guarded(|| {
            check_rank(rank, ranks)?;
            Ok(Self {
                counted: Counted::new(ranks, experts)?,
                cost: cost_model.inner.clone(),
                rank,
                planner: OwnPlanner::new(),
                calls: 0,
            })
        })
    }

    fn unsafe_quotas_ptr(
        &mut self,
        py: Python<'_>,
        ids: (usize, usize, usize, usize),
    ) -> PyResult<Vec<u32>> {
        let (ids, bits) = Ids::of(ids);
        py.detach(|| {
            // SAFETY: `waterfill_rs.exchange.host` gives live contiguous ids of this shape and width.
            unsafe { self.counted.count(ids, bits) }?;
            let mut quotas = vec![0; self.counted.visits.len()];
            self.calls += 1;
            guarded(|| self.planner.plan(&self.counted.own(&self.cost, self.rank), &mut quotas))?;
            Ok(quotas)
        })
    }

    #[getter]
    fn calls(&self) -> u64 {
        self.calls
    }
}

/// A rank at a board; with the planner in its waits where no thread has it.
#[pyclass(name = "Port")]
struct PyPort {
    inner: Port<Arc<Segment>>,
    planner: Option<BoardPlanner<Arc<Segment>>>,
    counted: Counted,
    quotas: Vec<u32>,
    process: u32,
}

#[pymethods]
impl PyPort {
    #[new]
    #[pyo3(signature = (board, rank, cost_model, *, plans_patience_us=None))]
    fn new(
        board: &PyBoard,
        rank: usize,
        cost_model: &PyCostModel,
        plans_patience_us: Option<u64>,
    ) -> PyResult<Self> {
        board_guarded(|| {
            let region = Arc::clone(&board.inner);
            Ok(Self {
                inner: Port::new(region, board.shape, cost_model.inner.clone(), rank)?,
                planner: plans_patience_us.map(|us| planner(board, cost_model, us)).transpose()?,
                counted: Counted::new(board.shape.ranks, board.shape.experts)?,
                quotas: vec![0; board.shape.ranks],
                process: std::process::id(),
            })
        })
    }

    /// `(how it ended, quotas)`.
    fn unsafe_quotas_ptr(
        &mut self,
        py: Python<'_>,
        ids: (usize, usize, usize, usize),
        cap_us: u64,
    ) -> PyResult<(&'static str, Vec<u32>)> {
        let (ids, bits) = Ids::of(ids);
        self.check_process()?;
        // A wait for peers: other threads may run meanwhile.
        py.detach(|| {
            // SAFETY: `waterfill_rs.exchange.host` gives live contiguous ids of this shape and width.
            unsafe { self.counted.count(ids, bits) }?;
            let cap = Duration::from_micros(cap_us);
            let outcome = board_guarded(|| self.exchange(cap))?;
            Ok((name_of(outcome), self.quotas.clone()))
        })
    }

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
    fn exchange(&mut self, cap: Duration) -> waterfill_board::Result<Outcome> {
        let Counted { tokens, visits, counts, .. } = &self.counted;
        let posted = Posted { tokens: *tokens, visits, counts };
        self.inner.post(posted)?;
        let planner = &mut self.planner;
        let meanwhile = || {
            planner.as_mut().map(BoardPlanner::poll);
        };
        self.inner.finish_with(posted, cap, &mut self.quotas, meanwhile)
    }

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

fn name_of(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Live => "live",
        Outcome::NoPlan => "none",
        Outcome::TimedOut => "timed_out",
        Outcome::Broken => "broken",
        Outcome::Torn => "torn",
    }
}
