//! What rows cost: the model that turns a number of rows of one expert into time.

use crate::error::{Error, Result};

/// The largest figure of a curve, in picoseconds.
const LIMIT: f64 = 1e15;
/// The most that one rank's rows may cost, in picoseconds (75 minutes): sums over 1024 ranks fit 63 bits.
const MOST_COST: u64 = 1 << 52;

/// The cost of running a number of rows through one expert: zero for no rows, and never less for more rows.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum CostModel {
    /// A row costs 1, whatever the expert: what sglang's Waterfill levels.
    Rows,
    /// Two figures of the machine and the tile of its kernel.
    Roofline(Roofline),
    /// A measured curve.
    Table(Table),
}

impl CostModel {
    /// The cost of `rows` rows of one expert: rows for [`Rows`](Self::Rows), picoseconds for the others.
    #[must_use]
    pub fn cost(&self, rows: u64) -> u64 {
        match self {
            Self::Rows => rows,
            Self::Roofline(roofline) => roofline.cost(rows),
            Self::Table(table) => table.cost(rows),
        }
    }

    /// The most rows that cost no more than `budget`.
    #[must_use]
    pub fn rows_within(&self, budget: u64) -> u64 {
        match self {
            Self::Rows => budget,
            Self::Roofline(roofline) => roofline.rows_within(budget),
            Self::Table(table) => table.rows_within(budget),
        }
    }
}

/// An active expert's weights take `weights` to load; meanwhile each started tile of rows takes its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Roofline {
    weights: u64,
    per_tile: u64,
    tile: u64,
}

impl Roofline {
    /// `weights_us` microseconds to load an expert's weights, `row_us` for a row once the weights
    /// no longer bound, rows rounded up to a multiple of `tile`.
    ///
    /// # Errors
    /// A figure that is not finite, negative, zero (`row_us`) or above 10^9 us; a tile of zero or above 65536.
    pub fn new(weights_us: f64, row_us: f64, tile: u32) -> Result<Self> {
        let per_tile = picoseconds("row_us x tile", row_us * f64::from(tile))?;
        if per_tile == 0 || tile > 65536 {
            let requirement = "such that a tile of 1 to 65536 rows takes at least a picosecond";
            return Err(Error::Cost {
                name: "row_us x tile",
                value: row_us * f64::from(tile),
                requirement,
            });
        }
        Ok(Self {
            weights: picoseconds("weights_us", weights_us)?,
            per_tile,
            tile: u64::from(tile),
        })
    }

    fn cost(&self, rows: u64) -> u64 {
        let tiles = rows.div_ceil(self.tile);
        if rows == 0 { 0 } else { self.weights.max(tiles.saturating_mul(self.per_tile)) }
    }

    fn rows_within(&self, budget: u64) -> u64 {
        if budget < self.weights { 0 } else { (budget / self.per_tile).saturating_mul(self.tile) }
    }
}

/// A staircase through measured points; past the last one, more steps like the last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// `(rows, cost)`: any number of rows up to `rows` costs `cost`. Rows strictly rise, costs never fall.
    steps: Vec<(u64, u64)>,
}

impl Table {
    /// `points` are `(rows, microseconds)`, rows rising: up to that many rows of one expert take that long.
    ///
    /// # Errors
    /// No point, rows that do not rise from at least 1, a cost that is not finite, under a picosecond or falls.
    pub fn new(points: &[(u64, f64)]) -> Result<Self> {
        if points.is_empty() {
            return Err(Error::Length { name: "cost table", found: 0, expected: 1 });
        }
        let mut steps: Vec<(u64, u64)> = Vec::with_capacity(points.len());
        for (index, &(rows, cost)) in points.iter().enumerate() {
            let (last_rows, last_cost) = steps.last().copied().unwrap_or((0, 0));
            let ticks = picoseconds("a cost of the table", cost)?;
            if rows <= last_rows || rows > u64::from(u32::MAX) {
                let requirement =
                    "of more rows than the entry before it (the first: of at least 1), below 2^32";
                return Err(Error::Table { index, rows, cost, requirement });
            }
            if ticks == 0 {
                let requirement = "of a picosecond or more: rows that cost nothing level nothing";
                return Err(Error::Table { index, rows, cost, requirement });
            }
            if ticks < last_cost {
                let requirement = "at least as costly as the entry before it";
                return Err(Error::Table { index, rows, cost, requirement });
            }
            steps.push((rows, ticks));
        }
        Ok(Self { steps })
    }

    fn cost(&self, rows: u64) -> u64 {
        if rows == 0 {
            return 0;
        }
        let step = self.steps.partition_point(|&(up_to, _)| up_to < rows);
        match self.steps.get(step) {
            Some(&(_, cost)) => cost,
            None => self.beyond(rows),
        }
    }

    /// Rows past the table take as long, row for row, as the table's last point.
    fn beyond(&self, rows: u64) -> u64 {
        let (last_rows, last_cost) = self.steps[self.steps.len() - 1];
        let cost = u128::from(rows) * u128::from(last_cost) / u128::from(last_rows);
        u64::try_from(cost).unwrap_or(u64::MAX)
    }

    fn rows_within(&self, budget: u64) -> u64 {
        let (last_rows, last_cost) = self.steps[self.steps.len() - 1];
        if budget < last_cost {
            let step = self.steps.partition_point(|&(_, cost)| cost <= budget);
            return if step == 0 { 0 } else { self.steps[step - 1].0 };
        }
        // The largest n with floor(n * last_cost / last_rows) <= budget.
        let bound = (u128::from(budget) + 1) * u128::from(last_rows) - 1;
        u64::try_from(bound / u128::from(last_cost)).unwrap_or(u64::MAX)
    }
}

/// No rank's cost can come near 64 bits, wherever `times` as many rows go: `routed` `[P]` and `shared` rows.
pub(crate) fn check_costs(
    cost: &CostModel,
    experts_per_rank: usize,
    routed: &[u32],
    shared: u64,
    times: u64,
) -> Result<()> {
    if matches!(cost, CostModel::Rows) {
        return Ok(()); // Rows fit 32 bits.
    }
    let largest = times * u64::from(routed.iter().copied().max().unwrap_or(0));
    let total = times * (sum(routed) + shared);
    let value =
        cost.cost(largest).saturating_mul(experts_per_rank as u64).saturating_add(cost.cost(total));
    if value <= MOST_COST {
        return Ok(());
    }
    let name = "a bound of one rank's cost, in picoseconds,";
    Err(Error::TooLarge { name, value, limit: MOST_COST })
}

/// A time in microseconds as whole picoseconds.
fn picoseconds(name: &'static str, microseconds: f64) -> Result<u64> {
    let value = microseconds * 1e6;
    if !(0.0..=LIMIT).contains(&value) {
        let requirement = "a time from 0 to 10^9 microseconds";
        return Err(Error::Cost { name, value: microseconds, requirement });
    }
    Ok(value.round() as u64)
}

/// All rows.
pub(crate) fn sum(rows: &[u32]) -> u64 {
    rows.iter().map(|&rows| u64::from(rows)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn models() -> Vec<CostModel> {
        let table = [(16, 19.0), (256, 25.0), (512, 41.0), (768, 62.5)];
        vec![
            CostModel::Rows,
            CostModel::Roofline(Roofline::new(20.0, 0.08, 64).unwrap()),
            CostModel::Roofline(Roofline::new(0.0, 0.3, 1).unwrap()),
            CostModel::Table(Table::new(&table).unwrap()),
            CostModel::Table(Table::new(&[(7, 3.0)]).unwrap()),
        ]
    }

    #[test]
    fn costs_start_at_zero_and_never_fall() {
        for model in models() {
            assert_eq!(model.cost(0), 0);
            assert!((0..4000).all(|n| model.cost(n) <= model.cost(n + 1)), "{model:?}");
        }
    }

    #[test]
    fn rows_within_is_the_inverse_of_cost() {
        for model in models() {
            for rows in 0..3000 {
                let most = model.rows_within(model.cost(rows));
                assert!(most >= rows, "{model:?} {rows}");
                assert!(most > 100_000 || model.cost(most) == model.cost(rows), "{model:?} {rows}");
                assert!(
                    most > 100_000 || model.cost(most + 1) > model.cost(rows),
                    "{model:?} {rows}"
                );
            }
        }
    }

    #[test]
    fn unusable_figures_are_refused_with_the_figure() {
        let refused = |e: Error, figure: &str| assert!(e.to_string().contains(figure), "{e}");
        refused(Roofline::new(f64::NAN, 1.0, 64).unwrap_err(), "NaN");
        refused(Roofline::new(-3.5, 1.0, 64).unwrap_err(), "-3.5");
        refused(Roofline::new(1.0, 0.0, 64).unwrap_err(), "0");
        refused(Table::new(&[]).unwrap_err(), "0 entries");
        refused(Table::new(&[(0, 1.0)]).unwrap_err(), "entry 0");
        refused(Table::new(&[(8, 1.0), (8, 2.0)]).unwrap_err(), "entry 1");
        refused(Table::new(&[(8, 2.0), (9, 1.0)]).unwrap_err(), "entry 1");
        refused(Table::new(&[(8, f64::INFINITY)]).unwrap_err(), "inf");
        refused(Table::new(&[(8, 0.0)]).unwrap_err(), "entry 0 (8 rows, cost 0)");
    }
}
