//! Plans and costs from plain sequences of integers.

use pyo3::prelude::*;
use waterfill_core::{
    CostModel, MAX_EXPERTS, MAX_RANKS, OwnCounts, OwnPlanner, Placement, Planner, Problem,
    Roofline, Routed, Table, score,
};

use crate::error::{guarded, refused};

pub fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("MAX_RANKS", MAX_RANKS)?;
    module.add("MAX_EXPERTS", MAX_EXPERTS)?;
    module.add_class::<PyCostModel>()?;
    module.add_class::<PyPlan>()?;
    module.add_function(wrap_pyfunction!(plan, module)?)?;
    module.add_function(wrap_pyfunction!(own_quotas, module)?)?;
    module.add_function(wrap_pyfunction!(max_and_mean, module)?)?;
    module.add_function(wrap_pyfunction!(costs, module)?)
}

/// What a number of rows of one expert costs: zero for none, never less for more.
#[pyclass(name = "CostModel", frozen)]
pub struct PyCostModel {
    pub inner: CostModel,
}

#[pymethods]
impl PyCostModel {
    /// A row costs 1.
    #[staticmethod]
    fn rows() -> Self {
        Self { inner: CostModel::Rows }
    }

    /// An active expert's weights take `weights_us` to load; rows, in tiles, `row_us` each. Picoseconds.
    #[staticmethod]
    fn roofline(weights_us: f64, row_us: f64, tile: i128) -> PyResult<Self> {
        let tile = fit("tile", tile)?;
        guarded(|| {
            Ok(Self { inner: CostModel::Roofline(Roofline::new(weights_us, row_us, tile)?) })
        })
    }

    /// A staircase of measured `(rows, microseconds)`, rows rising. Picoseconds.
    #[staticmethod]
    fn table(points: Vec<(i128, f64)>) -> PyResult<Self> {
        let points: PyResult<Vec<(u64, f64)>> =
            points.into_iter().map(|(rows, us)| Ok((fit("rows", rows)?, us))).collect();
        let points = points?;
        guarded(|| Ok(Self { inner: CostModel::Table(Table::new(&points)?) }))
    }

    /// Equal texts are equal models.
    fn __repr__(&self) -> String {
        format!("CostModel({:?})", self.inner)
    }

    /// The cost of `rows` rows of one expert.
    fn cost(&self, rows: i128) -> PyResult<u64> {
        // Costs of a layer's rows cannot overflow; of more they could.
        let rows: u32 = fit("rows", rows)?;
        Ok(self.inner.cost(rows.into()))
    }
}

/// An integer of Python's as the core takes it.
fn fit<T: TryFrom<i128>>(name: &str, value: i128) -> PyResult<T> {
    T::try_from(value).map_err(|_| {
        let most = (1u128 << (8 * size_of::<T>())) - 1;
        refused(format!("{name} is {value}: give an integer from 0 to {most}"))
    })
}

/// How many shared rows each source sends to each rank.
#[pyclass(name = "Plan", frozen)]
struct PyPlan {
    ranks: usize,
    inner: waterfill_core::Plan,
}

#[pymethods]
impl PyPlan {
    /// The slowest rank's cost under this plan, in the cost model's unit.
    #[getter]
    fn optimum(&self) -> u64 {
        self.inner.optimum()
    }

    /// `[R]` shared rows that each rank gets.
    #[getter]
    fn shared_rows(&self) -> Vec<u32> {
        self.inner.shared_rows().to_vec()
    }

    /// `[P]` routed rows of each physical expert; empty for a problem with counts per rank.
    #[getter]
    fn replica_rows(&self) -> Vec<u32> {
        self.inner.replica_rows().to_vec()
    }

    /// `[R]` how many tokens of `source` go to each rank.
    fn quotas_of(&self, source: i128) -> PyResult<Vec<u32>> {
        let source = fit("source", source)?;
        let mut quotas = vec![0; self.ranks];
        guarded(|| self.inner.quotas_of(source, &mut quotas))?;
        Ok(quotas)
    }
}

/// A plan from the counts of all ranks; see `waterfill_rs.plan`.
#[pyfunction]
#[pyo3(signature = (routed, tokens, *, ranks, physical_experts, physical_to_logical, visits, eligible, cost_model, policy))]
#[allow(clippy::too_many_arguments)] // Keyword arguments, each with a name of its own in Python.
fn plan(
    py: Python<'_>,
    routed: Vec<u32>,
    tokens: Vec<u32>,
    ranks: usize,
    physical_experts: usize,
    physical_to_logical: Option<Vec<u32>>,
    visits: Option<Vec<u32>>,
    eligible: Option<Vec<bool>>,
    cost_model: &PyCostModel,
    policy: &str,
) -> PyResult<PyPlan> {
    let make = match policy {
        "live" => Planner::live,
        "joint" => Planner::joint,
        "single_replica" => Planner::single_replica,
        "replicas" => Planner::replicas,
        other => {
            let text =
                format!("policy '{other}': give 'live', 'joint', 'single_replica' or 'replicas'");
            return Err(refused(text));
        }
    };
    let cost = &cost_model.inner;
    // A plan for 1024 ranks takes tens of microseconds: others may run meanwhile, for the arguments own their memory.
    py.detach(|| {
        guarded(|| {
            let placement = match &physical_to_logical {
                Some(map) => Placement::replicated(ranks, map)?,
                None => Placement::contiguous(ranks, physical_experts)?,
            };
            let per_rank = routed.len() == ranks && physical_experts != ranks;
            let routed =
                if per_rank { Routed::PerRank(&routed) } else { Routed::PerExpert(&routed) };
            let (tokens, visits, eligible) = (&tokens[..], visits.as_deref(), eligible.as_deref());
            let problem = Problem { placement: &placement, cost, routed, tokens, visits, eligible };
            let mut inner = waterfill_core::Plan::new();
            make(&mut Planner::new(), &problem, &mut inner)?;
            Ok(PyPlan { ranks, inner })
        })
    })
}

/// Quotas `[R]` from one rank's own counts.
#[pyfunction]
#[pyo3(signature = (routed, visits, tokens, *, ranks, rank, cost_model))]
fn own_quotas(
    routed: Vec<u32>,
    visits: Vec<u32>,
    tokens: u32,
    ranks: usize,
    rank: usize,
    cost_model: &PyCostModel,
) -> PyResult<Vec<u32>> {
    guarded(|| {
        let placement = Placement::contiguous(ranks, routed.len())?;
        let mut quotas = vec![0; ranks];
        let own = OwnCounts {
            placement: &placement,
            cost: &cost_model.inner,
            source: rank,
            routed: &routed,
            visits: &visits,
            tokens,
        };
        OwnPlanner::new().plan(&own, &mut quotas)?;
        Ok(quotas)
    })
}

/// `(max, mean)` of the ranks' costs.
#[pyfunction]
#[pyo3(signature = (routed, shared, *, ranks, cost_model))]
fn max_and_mean(
    routed: Vec<u32>,
    shared: Vec<u32>,
    ranks: usize,
    cost_model: &PyCostModel,
) -> PyResult<(u64, f64)> {
    guarded(|| {
        let placement = Placement::contiguous(ranks, routed.len())?;
        let found = score::max_and_mean(&placement, &cost_model.inner, &routed, &shared)?;
        Ok((found.max, found.mean))
    })
}

/// The ranks' costs `[R]` for each of several placements of the shared rows, `[R]` each.
#[pyfunction]
#[pyo3(signature = (routed, placements, *, ranks, cost_model))]
fn costs(
    routed: Vec<u32>,
    placements: Vec<Vec<u32>>,
    ranks: usize,
    cost_model: &PyCostModel,
) -> PyResult<Vec<Vec<u64>>> {
    guarded(|| {
        let placement = Placement::contiguous(ranks, routed.len())?;
        let costs = |shared: &Vec<u32>| {
            Ok(score::costs(&placement, &cost_model.inner, &routed, shared)?.collect())
        };
        placements.iter().map(costs).collect()
    })
}
