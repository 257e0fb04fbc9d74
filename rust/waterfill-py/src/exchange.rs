//! One rank's end of each exchange: its tokens' ids in, its quotas out.

use std::sync::Arc;
use std::time::Duration;

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use waterfill_board::{BoardPlanner, Outcome, Port, Posted, Segment};
use waterfill_core::{
    CostModel, Error, Id, OwnCounts, OwnPlanner, Placement, Plan, Planner, Problem, Routed, count,
};

use crate::board::{PyBoard, planner, tally_dict};
use crate::error::{board_guarded, guarded};
use crate::plan::PyCostModel;
use crate::tensors::{Ids, array, array_mut, unknown_bits};

pub fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PySolo>()?;
    module.add_class::<PyPort>()?;
    module.add("REFUSED", REFUSED as i32)?;
    module.add_class::<PyGroupPlanner>()
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
            Ok((outcome.name(), self.quotas.clone()))
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

/// In place of its tokens, of a rank that refused its ids: it takes part, and nothing is known of it.
const REFUSED: u32 = u32::MAX;

/// Plans from counts that a collective brought: the same on every rank.
#[pyclass(name = "GroupPlanner")]
struct PyGroupPlanner {
    counted: Counted,
    cost: CostModel,
    rank: usize,
    tokens: Vec<u32>,
    visits: Vec<u32>,
    routed: Vec<u32>,
    eligible: Vec<bool>,
    planner: Planner,
    own: OwnPlanner,
    plan: Plan,
}

#[pymethods]
impl PyGroupPlanner {
    #[new]
    fn new(ranks: usize, experts: usize, rank: usize, cost_model: &PyCostModel) -> PyResult<Self> {
        guarded(|| {
            check_rank(rank, ranks)?;
            Ok(Self {
                counted: Counted::new(ranks, experts)?,
                cost: cost_model.inner.clone(),
                rank,
                tokens: vec![0; ranks],
                visits: vec![0; ranks * ranks],
                routed: vec![0; experts],
                eligible: vec![true; ranks],
                planner: Planner::new(),
                own: OwnPlanner::new(),
                plan: Plan::new(),
            })
        })
    }

    /// Integers that each rank contributes: its tokens, its visits `[R]`, its counts `[P]`.
    #[getter]
    fn words(&self) -> usize {
        1 + self.tokens.len() + self.routed.len()
    }

    /// Write what this rank contributes, `[words]` int32.
    fn unsafe_count_ptr(
        &mut self,
        py: Python<'_>,
        ids: (usize, usize, usize, usize),
        out: usize,
    ) -> PyResult<()> {
        let (ids, bits) = Ids::of(ids);
        py.detach(|| {
            // SAFETY: `waterfill_rs.exchange.host` gives live contiguous ids of this shape and width, and an
            // int32 tensor of `words` elements that nobody else uses.
            let out = unsafe {
                self.counted.count(ids, bits)?;
                array_mut::<u32>("out", out, self.words())?
            };
            let Counted { tokens, visits, counts, .. } = &self.counted;
            let values = std::iter::once(tokens).chain(visits).chain(counts);
            out.iter_mut().zip(values).for_each(|(out, &value)| *out = value);
            Ok(())
        })
    }

    /// This rank's quotas from what it counted last, by itself.
    fn own_quotas(&mut self, py: Python<'_>) -> PyResult<Vec<u32>> {
        py.detach(|| {
            let mut quotas = vec![0; self.tokens.len()];
            guarded(|| self.own.plan(&self.counted.own(&self.cost, self.rank), &mut quotas))?;
            Ok(quotas)
        })
    }

    /// This rank's quotas from what all ranks contributed, `[R, words]` int32.
    fn unsafe_quotas_ptr(&mut self, py: Python<'_>, gathered: usize) -> PyResult<Vec<u32>> {
        py.detach(|| {
            let length = self.tokens.len() * self.words();
            // SAFETY: `waterfill_rs.exchange.host` gives a live contiguous int32 tensor of this size.
            let gathered = unsafe { array::<u32>("gathered", gathered, length) }?;
            guarded(|| self.plan(gathered))
        })
    }
}

impl PyGroupPlanner {
    fn plan(&mut self, gathered: &[u32]) -> waterfill_core::Result<Vec<u32>> {
        let ranks = self.tokens.len();
        self.routed.fill(0);
        for (rank, words) in gathered.chunks_exact(1 + ranks + self.routed.len()).enumerate() {
            let visits_of_rank = &mut self.visits[rank * ranks..][..ranks];
            self.eligible[rank] = words[0] != REFUSED;
            if !self.eligible[rank] {
                self.tokens[rank] = 0;
                visits_of_rank.fill(0);
                continue;
            }
            let (visits, counts) = words[1..].split_at(ranks);
            self.tokens[rank] = words[0];
            visits_of_rank.copy_from_slice(visits);
            for (sum, &rows) in self.routed.iter_mut().zip(counts) {
                *sum = sum.saturating_add(rows);
            }
        }
        let problem = Problem {
            placement: &self.counted.placement,
            cost: &self.cost,
            routed: Routed::PerExpert(&self.routed),
            tokens: &self.tokens,
            visits: Some(&self.visits),
            eligible: Some(&self.eligible),
        };
        self.planner.live(&problem, &mut self.plan)?;
        let mut quotas = vec![0; ranks];
        self.plan.quotas_of(self.rank, &mut quotas)?;
        Ok(quotas)
    }
}
