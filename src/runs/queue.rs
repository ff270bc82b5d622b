//! The order of waiting runs, and when each may begin.

use std::cmp::Reverse;
use std::collections::HashMap;

use time::{Duration, OffsetDateTime};
use uuid::Uuid;

use super::pace;
use super::spec::RunSpec;
use super::state;
use crate::store::runs::{Run, RunState};
use crate::store::{Store, StoreError};

/// Where a waiting run is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Place {
    /// From 1.
    pub position: u64,
    /// When a worker may take it; `None` where it cannot be told.
    pub expected_start_at: Option<OffsetDateTime>,
}

/// Puts runs, the oldest first, into the order in which they begin: by priority, of the same one the older first.
pub fn sort(waiting: &mut [Run]) {
    waiting.sort_by_key(|run| Reverse(run.priority)); // stable
}

/// The place of every waiting run.
///
/// # Errors
/// When the database fails.
pub async fn places(store: &Store, workers: usize) -> Result<HashMap<Uuid, Place>, StoreError> {
    let mut waiting = store.runs_in(&[RunState::Queued]).await?;
    if waiting.is_empty() {
        return Ok(HashMap::new());
    }
    sort(&mut waiting);
    let held = store.runs_in(&state::HELD).await?;
    let mut durations = Vec::with_capacity(waiting.len());
    for run in &waiting {
        durations.push(duration_s(store, run).await?);
    }
    let starts = starts(held.iter().map(left_s).collect(), workers, &durations);
    let now = OffsetDateTime::now_utc();
    let at = |s: f64| {
        let whole = Duration::checked_seconds_f64(s)?;
        now.checked_add(whole)
    };
    let places = waiting
        .iter()
        .zip(1..)
        .zip(starts)
        .map(|((run, position), start)| {
            let expected_start_at = start.and_then(at);
            let place = Place {
                position,
                expected_start_at,
            };
            (run.id, place)
        });
    Ok(places.collect())
}

/// How long a worker will still be at a run.
fn left_s(run: &Run) -> Option<f64> {
    match run.state {
        RunState::Pausing | RunState::Cancelling | RunState::Saving => Some(0.0),
        _ => run.eta_s,
    }
}

/// How long the training of a waiting run will take.
async fn duration_s(store: &Store, run: &Run) -> Result<Option<f64>, StoreError> {
    let (Some(total), Ok(spec)) = (run.total_steps, serde_json::from_str::<RunSpec>(&run.spec))
    else {
        return Ok(None);
    };
    let left = total.saturating_sub(run.kept_step.unwrap_or(0));
    let pace = pace::expected(store, &spec, None).await?;
    Ok(pace.map(|pace| pace.step_time_s * left as f64))
}

/// When each of the waiting runs begins, in seconds from now. After the first that cannot be told none can.
fn starts(held: Vec<Option<f64>>, workers: usize, waiting: &[Option<f64>]) -> Vec<Option<f64>> {
    // When each worker is free; the unknown ones last.
    let mut free = held;
    free.resize(free.len().max(workers), Some(0.0));
    let by_time = |a: &Option<f64>, b: &Option<f64>| {
        let time = |s: &Option<f64>| s.unwrap_or(f64::INFINITY);
        time(a).total_cmp(&time(b))
    };
    free.sort_by(by_time);
    // More are held than may run now: an earlier service had more workers.
    let surplus = free.len() - workers.min(free.len());
    let mut starts = Vec::with_capacity(waiting.len());
    for duration in waiting {
        let all_known = free.iter().all(Option::is_some);
        let next = free.get(surplus).copied().flatten();
        let start = next.filter(|start| all_known || *start == 0.0);
        starts.push(start);
        let Some(start) = start else {
            break;
        };
        free[surplus] = duration.map(|duration| start + duration);
        free.sort_by(by_time);
    }
    starts.resize(waiting.len(), None);
    starts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_start_is_told_where_every_end_before_it_is_known() {
        let second = |s: &[f64]| s.iter().copied().map(Some).collect::<Vec<_>>();
        // Two workers: one is free in 10 s, one at once.
        let found = starts(second(&[10.0]), 2, &second(&[4.0, 3.0, 5.0, 1.0]));
        assert_eq!(found, second(&[0.0, 4.0, 7.0, 10.0]));
        // Nobody knows when the one worker is free.
        assert_eq!(starts(vec![None], 1, &second(&[1.0])), [None]);
        // One is free at once, the other some time: only the first start is known.
        let found = starts(vec![None], 2, &[Some(1.0), Some(1.0)]);
        assert_eq!(found, [Some(0.0), None]);
        // How long the first takes is not known.
        let found = starts(Vec::new(), 1, &[None, Some(1.0)]);
        assert_eq!(found, [Some(0.0), None]);
        // Three runs are held, one may run: two have to end first.
        let found = starts(second(&[5.0, 1.0, 9.0]), 1, &second(&[1.0]));
        assert_eq!(found, second(&[9.0]));
        assert!(starts(Vec::new(), 1, &[]).is_empty());
    }
}
