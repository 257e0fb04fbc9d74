//! A layer's replicas: the table that ranks, planner and kernel share, and the choice by quotas.

use std::sync::Arc;

use pyo3::prelude::*;
use waterfill_core::{ReplicaTable, choose_replicas};

use crate::error::guarded;

pub fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PyReplicaTable>()?;
    module.add_function(wrap_pyfunction!(replicas_by_quotas, module)?)
}

/// The replicas of one layer.
#[pyclass(name = "ReplicaTable", frozen)]
pub struct PyReplicaTable {
    pub inner: Arc<ReplicaTable>,
}

#[pymethods]
impl PyReplicaTable {
    /// Of a map `[P]` of physical to logical experts.
    #[new]
    fn new(ranks: usize, physical_to_logical: Vec<u32>) -> PyResult<Self> {
        guarded(|| Ok(Self { inner: Arc::new(ReplicaTable::new(ranks, &physical_to_logical)?) }))
    }

    /// A number of the map's content, never 0.
    #[getter]
    fn fingerprint(&self) -> u32 {
        self.inner.fingerprint()
    }

    /// Physical experts beyond one for each logical expert.
    #[getter]
    fn redundant(&self) -> usize {
        self.inner.redundant()
    }

    /// Replicated experts.
    #[getter]
    fn jobs(&self) -> usize {
        self.inner.jobs()
    }

    /// Replicas of replicated experts.
    #[getter]
    fn slots(&self) -> usize {
        self.inner.slots()
    }

    /// `[P]` the primary replica of each physical expert's logical one.
    #[getter]
    fn primaries(&self) -> Vec<u32> {
        self.inner.primaries().of.clone()
    }

    /// How many of a rank's physical experts are primary, if these are its first ones, on every rank as many.
    #[getter]
    fn first_primaries(&self) -> Option<usize> {
        self.inner.primaries().first
    }

    /// The table as a kernel reads it, for an int32 tensor: numbers from 2^31 on are negative.
    #[getter]
    fn words(&self) -> Vec<i32> {
        signed(self.inner.words())
    }

    /// How many numbers `words` has, whatever the map.
    #[staticmethod]
    fn words_of(physical_experts: usize, redundant: usize) -> usize {
        ReplicaTable::words_of(physical_experts, redundant)
    }

    /// The same of a layer without replicas.
    #[staticmethod]
    fn words_without(physical_experts: usize, redundant: usize) -> Vec<i32> {
        signed(ReplicaTable::words_without(physical_experts, redundant))
    }
}

fn signed(words: Vec<u32>) -> Vec<i32> {
    words.into_iter().map(u32::cast_signed).collect()
}

/// The ids `[N * top_k]` with the replicas that the quotas `[slots]` say.
#[pyfunction(name = "choose_replicas")]
fn replicas_by_quotas(
    table: &PyReplicaTable,
    quotas: Vec<u32>,
    mut ids: Vec<i64>,
    top_k: usize,
) -> PyResult<Vec<i64>> {
    guarded(|| choose_replicas(&table.inner, &quotas, &mut ids, top_k))?;
    Ok(ids)
}
