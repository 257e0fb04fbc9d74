//! The board: a segment, the planner's thread beside it, and a look at it from outside.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyTuple};
use waterfill_board::{
    BoardPlanner, End, Held, Observer, Outcome, Pace, PlannerThread, PlannerWatch, Presence,
    Published, Region, SNAPSHOT_VERSION, Segment, Shape, Snapshot, Tally, Waits, leave_in_child,
};

use crate::error::{board_guarded, refused};
use crate::plan::PyCostModel;
use crate::replicas::PyReplicaTable;

pub fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("SNAPSHOT_VERSION", SNAPSHOT_VERSION)?;
    module.add("SHARED_MEMORY", Segment::FOLDER)?;
    module.add("OUTCOMES", PyTuple::new(module.py(), Outcome::NAMES)?)?;
    module.add_class::<PyBoard>()?;
    module.add_class::<PyPlannerThread>()?;
    module.add_class::<PyDeviceEnd>()?;
    module.add_function(wrap_pyfunction!(leave_boards_in_child, module)?)?;
    module.add_function(wrap_pyfunction!(board_bytes, module)?)?;
    module.add_class::<PyObserver>()
}

/// A segment in POSIX shared memory on which ranks of one host exchange counts.
#[pyclass(name = "Board", frozen)]
pub struct PyBoard {
    pub inner: Arc<Segment>,
    pub shape: Shape,
}

#[pymethods]
impl PyBoard {
    /// Make the segment `name` for all who know `run`, 128 random bits.
    #[staticmethod]
    #[pyo3(signature = (name, ranks, experts, run, redundant=0))]
    fn create(
        name: &str,
        ranks: usize,
        experts: usize,
        run: u128,
        redundant: usize,
    ) -> PyResult<Self> {
        board_guarded(|| {
            let shape = Shape::with_redundant(ranks, experts, redundant)?;
            Ok(Self { inner: Arc::new(Segment::create(name, shape, run)?), shape })
        })
    }

    /// Attach to what another process made with the same arguments.
    #[staticmethod]
    #[pyo3(signature = (name, ranks, experts, run, redundant=0))]
    fn attach(
        name: &str,
        ranks: usize,
        experts: usize,
        run: u128,
        redundant: usize,
    ) -> PyResult<Self> {
        board_guarded(|| {
            let shape = Shape::with_redundant(ranks, experts, redundant)?;
            Ok(Self { inner: Arc::new(Segment::attach(name, shape, run)?), shape })
        })
    }

    /// Take the name away, once all are attached; the memory goes with the last of them.
    fn unlink(&self) -> PyResult<()> {
        board_guarded(|| self.inner.unlink())
    }

    /// Where its name is, or was.
    #[getter]
    fn path(&self) -> PathBuf {
        self.inner.path().to_path_buf()
    }

    /// Words that a rank posts in a call, but for the last, which says whether it waits.
    #[getter]
    fn words(&self) -> usize {
        self.shape.posted_waits()
    }

    /// What ranks and planner counted until now.
    fn snapshot<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        snapshot_dict(py, &board_guarded(|| Snapshot::of(&self.inner, self.shape))?)
    }
}

/// In the child of a fork: no longer seem to be the parent at its boards.
#[pyfunction]
fn leave_boards_in_child() {
    leave_in_child();
}

/// What a board of this shape takes of the shared memory.
#[pyfunction]
#[pyo3(signature = (ranks, experts, redundant=0))]
fn board_bytes(ranks: usize, experts: usize, redundant: usize) -> PyResult<usize> {
    board_guarded(|| Ok(Shape::with_redundant(ranks, experts, redundant)?.bytes()))
}

/// The end of a rank whose calls a kernel makes: the others see that its process lives, and its kernel whether the
/// planner's does.
#[pyclass(name = "DeviceEnd", frozen)]
struct PyDeviceEnd {
    unwatched: Option<String>,
    inner: std::sync::Mutex<Option<(Option<Held>, Option<PlannerWatch>)>>,
}

#[pymethods]
impl PyDeviceEnd {
    /// `plans`: the planner is in this process.
    #[new]
    fn new(board: &PyBoard, rank: usize, plans: bool) -> PyResult<Self> {
        let region = &board.inner;
        let (held, unwatched) = match region.hold(End::Rank(rank)) {
            Ok(held) => (held, None),
            Err(error) => (None, Some(error.to_string())),
        };
        // The planner in this very process needs no watch.
        let watch = (!plans).then(|| PlannerWatch::spawn(Arc::clone(region), board.shape, rank));
        let inner = std::sync::Mutex::new(Some((held, watch.transpose()?)));
        Ok(Self { unwatched, inner })
    }

    /// Why the others cannot see whether this process lives, if they can't.
    #[getter]
    fn unwatched(&self) -> Option<&str> {
        self.unwatched.as_deref()
    }

    /// The process leaves the board: it makes no more calls.
    fn leave(&self, py: Python<'_>) {
        py.detach(|| drop(self.inner.lock().ok().and_then(|mut inner| inner.take())));
    }
}

/// The planner of a board, on a thread without Python; it ends with `stop` or with the object.
#[pyclass(name = "PlannerThread", frozen)]
struct PyPlannerThread {
    unwatched: Option<String>,
    inner: std::sync::Mutex<Option<PlannerThread>>,
}

#[pymethods]
impl PyPlannerThread {
    /// `pace`: `spin`, pinned to `core` if given, or `park`.
    #[new]
    #[pyo3(signature = (board, cost_model, *, patience_us, pace, core=None))]
    fn new(
        board: &PyBoard,
        cost_model: &PyCostModel,
        patience_us: u64,
        pace: &str,
        core: Option<usize>,
    ) -> PyResult<Self> {
        let pace = match pace {
            "spin" => Pace::Spin(core),
            "park" => Pace::Park,
            other => return Err(refused(format!("pace '{other}': give 'spin' or 'park'"))),
        };
        let planner = board_guarded(|| planner(board, cost_model, patience_us))?;
        let unwatched = planner.unwatched().map(ToString::to_string);
        let thread = PlannerThread::spawn(planner, pace)?;
        Ok(Self { unwatched, inner: std::sync::Mutex::new(Some(thread)) })
    }

    /// Why the ranks cannot see whether this process lives, if they can't.
    #[getter]
    fn unwatched(&self) -> Option<&str> {
        self.unwatched.as_deref()
    }

    /// The planner's map of `layer` from now on.
    fn set_map(&self, layer: usize, table: &PyReplicaTable) {
        if let Ok(thread) = self.inner.lock()
            && let Some(thread) = thread.as_ref()
        {
            thread.set_map(layer, Arc::clone(&table.inner));
        }
    }

    /// Before a call: if the thread sleeps, it is awake by the time that the counts come.
    fn wake(&self) {
        if let Ok(thread) = self.inner.lock() {
            thread.as_ref().map(PlannerThread::wake);
        }
    }

    /// End the thread.
    fn stop(&self, py: Python<'_>) {
        // The thread ends at its next look at the board, for which it is woken.
        py.detach(|| {
            let thread = self.inner.lock().ok().and_then(|mut thread| thread.take());
            drop(thread);
        });
    }
}

/// The planner of a board, for a thread or for the rank beside it.
pub fn planner(
    board: &PyBoard,
    cost_model: &PyCostModel,
    patience_us: u64,
) -> waterfill_board::Result<BoardPlanner<Arc<Segment>>> {
    let patience = Duration::from_micros(patience_us);
    BoardPlanner::new(Arc::clone(&board.inner), board.shape, cost_model.inner.clone(), patience)
}

/// A board from outside, read only.
#[pyclass(name = "Observer", frozen)]
struct PyObserver {
    inner: Observer,
}

#[pymethods]
impl PyObserver {
    /// At a path in /dev/shm, or `/proc/PID/fd/N` once its name is gone.
    #[new]
    fn new(path: PathBuf) -> PyResult<Self> {
        board_guarded(|| Ok(Self { inner: Observer::attach(&path)? }))
    }

    /// What ranks and planner counted until now.
    fn snapshot<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        snapshot_dict(py, &self.inner.snapshot())
    }
}

fn snapshot_dict<'py>(py: Python<'py>, snapshot: &Snapshot) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("version", SNAPSHOT_VERSION)?;
    dict.set_item("ranks", snapshot.shape.ranks)?;
    dict.set_item("experts", snapshot.shape.experts)?;
    dict.set_item("redundant", snapshot.shape.redundant)?;
    let ranks = snapshot.ranks.iter().zip(&snapshot.presence);
    let ranks: PyResult<Vec<_>> = ranks
        .map(|(tally, presence)| {
            let rank = tally_dict(py, tally)?;
            rank.set_item("alive", is_alive(*presence))?;
            Ok(rank)
        })
        .collect();
    dict.set_item("by_rank", PyList::new(py, ranks?)?)?;
    let planner = planner_dict(py, &snapshot.planner)?;
    planner.set_item("alive", is_alive(snapshot.planner_presence))?;
    dict.set_item("planner", planner)?;
    Ok(dict)
}

/// None if that cannot be known.
fn is_alive(presence: Presence) -> Option<bool> {
    match presence {
        Presence::Here => Some(true),
        Presence::Gone => Some(false),
        Presence::Unwatched => None,
    }
}

pub fn tally_dict<'py>(py: Python<'py>, tally: &Tally) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    let process = [("process", tally.process), ("calls", tally.calls())];
    let ended = process.into_iter().chain(tally.ended.by_name());
    for (name, count) in ended.chain([("tokens", tally.tokens)]) {
        dict.set_item(name, count)?;
    }
    dict.set_item("wait_us", waits_dict(py, &tally.waits)?)?;
    Ok(dict)
}

fn waits_dict<'py>(py: Python<'py>, waits: &Waits) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    let microseconds = |nanoseconds: u64| nanoseconds as f64 / 1e3;
    dict.set_item("p50", microseconds(waits.quantile(0.5)))?;
    dict.set_item("p99", microseconds(waits.quantile(0.99)))?;
    dict.set_item("max", microseconds(waits.longest()))?;
    let counted = waits.buckets().iter().enumerate().filter(|&(_, &count)| count > 0);
    let buckets: Vec<(f64, u64)> =
        counted.map(|(bucket, &count)| (microseconds(Waits::limit(bucket)), count)).collect();
    dict.set_item("buckets", buckets)?;
    Ok(dict)
}

fn planner_dict<'py>(py: Python<'py>, published: &Published) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    let counts = [
        ("process", published.process),
        ("whole", published.whole),
        ("partial", published.partial),
        ("late", published.late),
        ("silent", published.silent),
        ("given_up", published.given_up),
        ("refused", published.refused),
        ("home_max", published.home),
        ("planned_max", published.planned),
        ("mean", published.mean),
        ("replicas", published.replicas),
    ];
    for (name, count) in counts {
        dict.set_item(name, count)?;
    }
    dict.set_item("missed", published.missed.clone())?;
    Ok(dict)
}
