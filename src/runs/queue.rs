//! The order of waiting runs, and when each may begin.

use std::cmp::Reverse;
use std::collections::HashMap;

use time::{Duration, OffsetDateTime};
use uuid::Uuid;

use super::pace;
use super::spec::RunSpec;
use super::state;
use crate::store::runs::{Room, Run, RunState, Turns};
use crate::store::{Store, StoreError};

/// How exact the time of a start is told. A finer one would change with every question.
const START_EXACT_S: i64 = 10;

/// Where a waiting run is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Place {
    /// From 1.
    pub position: u64,
    /// When a worker may take it; `None` where it cannot be told.
    pub expected_start_at: Option<OffsetDateTime>,
}

/// So many runs at the same time, on all devices together and on each.
pub fn room(runs: usize, per_device: usize) -> Room {
    Room {
        runs,
        per_device,
        held: &state::HELD,
    }
}

/// What is taken of the room there is.
pub struct Used {
    room: Room,
    runs: usize,
    devices: HashMap<String, usize>,
}

impl Used {
    /// Nothing yet.
    pub fn new(room: Room) -> Self {
        Self {
            room,
            runs: 0,
            devices: HashMap::new(),
        }
    }

    /// Takes a place on a device.
    pub fn take(&mut self, device: Option<&str>) {
        self.runs += 1;
        let device = device.unwrap_or_default().to_owned();
        *self.devices.entry(device).or_default() += 1;
    }

    fn give_back(&mut self, device: Option<&str>) {
        self.runs -= 1;
        if let Some(count) = self.devices.get_mut(device.unwrap_or_default()) {
            *count -= 1;
        }
    }

    /// Whether one more run may use a device.
    pub fn has_room(&self, device: Option<&str>) -> bool {
        let same = self.devices.get(device.unwrap_or_default());
        self.runs < self.room.runs && same.is_none_or(|count| *count < self.room.per_device)
    }
}

/// Puts runs into the order in which they begin: by priority; of the same one those first that have lost their worker,
/// then in turn one of each key, beginning with the key whose last turn is the longest ago; of a key the oldest.
pub fn order(mut waiting: Vec<Run>, mut turns: Turns) -> Vec<Run> {
    waiting.sort_by_key(|run| (Reverse(run.priority), Reverse(run.keeps_turn), run.number));
    let mut order = Vec::with_capacity(waiting.len());
    while let Some(first) = waiting.first() {
        let class = (first.priority, first.keeps_turn);
        let same = waiting
            .iter()
            .take_while(|run| (run.priority, run.keeps_turn) == class);
        let next = same.enumerate().min_by_key(|(_, run)| {
            let last = turns.last(run.api_key_id);
            (if run.keeps_turn { 0 } else { last }, run.number)
        });
        let run = waiting.remove(next.map_or(0, |(index, _)| index));
        turns.give(run.api_key_id);
        order.push(run);
    }
    order
}

/// The place of every waiting run.
///
/// # Errors
/// When the database fails.
pub async fn places(store: &Store, room: Room) -> Result<HashMap<Uuid, Place>, StoreError> {
    let waiting = store.runs_in(&[RunState::Queued]).await?;
    if waiting.is_empty() {
        return Ok(HashMap::new());
    }
    let waiting = order(waiting, store.turns().await?);
    let held = store.runs_in(&state::HELD).await?;
    let held: Vec<Stay> = held
        .iter()
        .map(|run| Stay {
            device: run.used_device(),
            duration_s: left_s(run),
        })
        .collect();
    let mut stays = Vec::with_capacity(waiting.len());
    for run in &waiting {
        stays.push(Stay {
            device: run.wanted_device.as_deref(),
            duration_s: duration_s(store, run).await?,
        });
    }
    let starts = starts(&held, room, &stays);
    let now = OffsetDateTime::now_utc();
    let places = waiting.iter().zip(1..).zip(starts);
    let places = places.map(|((run, position), start)| {
        let expected_start_at = start.and_then(|start| rounded(now, start));
        let place = Place {
            position,
            expected_start_at,
        };
        (run.id, place)
    });
    Ok(places.collect())
}

/// So many seconds from now, rounded up.
fn rounded(now: OffsetDateTime, s: f64) -> Option<OffsetDateTime> {
    let at = now.checked_add(Duration::checked_seconds_f64(s)?)?;
    let up = (at.unix_timestamp() / START_EXACT_S + 1) * START_EXACT_S;
    OffsetDateTime::from_unix_timestamp(up).ok()
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

/// A run on its device.
#[derive(Clone, Copy, Debug)]
struct Stay<'a> {
    device: Option<&'a str>,
    /// How long it is there from its start, or from now; `None` where it cannot be told.
    duration_s: Option<f64>,
}

/// When each of the waiting runs begins, in seconds from now; `None` where it depends on an end that nobody knows.
fn starts(held: &[Stay<'_>], room: Room, waiting: &[Stay<'_>]) -> Vec<Option<f64>> {
    let end = |from: f64, stay: &Stay<'_>| stay.duration_s.map_or(f64::INFINITY, |s| from + s);
    let crowded = held.len() + waiting.len() > room.runs;
    let mut used = Used::new(room);
    let mut there: Vec<(f64, Option<&str>)> = Vec::new();
    for stay in held {
        used.take(stay.device);
        there.push((end(0.0, stay), stay.device));
    }
    let mut starts = vec![None; waiting.len()];
    let mut left: Vec<usize> = (0..waiting.len()).collect();
    let mut now = 0.0;
    loop {
        left.retain(|&index| {
            let stay = &waiting[index];
            if !used.has_room(stay.device) {
                return true;
            }
            // It may begin earlier where others leave earlier than is known.
            let unknown = there
                .iter()
                .any(|(end, device)| end.is_infinite() && (crowded || *device == stay.device));
            starts[index] = (now == 0.0 || !unknown).then_some(now);
            let end = if starts[index].is_some() {
                end(now, stay)
            } else {
                f64::INFINITY
            };
            used.take(stay.device);
            there.push((end, stay.device));
            false
        });
        let next = there
            .iter()
            .map(|(end, _)| *end)
            .fold(f64::INFINITY, f64::min);
        if left.is_empty() || next.is_infinite() {
            return starts;
        }
        now = next;
        there.retain(|(end, device)| {
            let stays = *end > now;
            if !stays {
                used.give_back(*device);
            }
            stays
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stays<'a>(of: &[(&'a str, Option<f64>)]) -> Vec<Stay<'a>> {
        let stay = |(device, duration_s): &(&'a str, Option<f64>)| Stay {
            device: Some(*device),
            duration_s: *duration_s,
        };
        of.iter().map(stay).collect()
    }

    #[test]
    fn a_start_is_told_where_every_end_before_it_is_known() {
        let on = |s: &[f64]| s.iter().map(|s| ("cpu", Some(*s))).collect::<Vec<_>>();
        let known = |s: &[f64]| s.iter().copied().map(Some).collect::<Vec<_>>();
        let found = |held: &[(&str, Option<f64>)], per_device, waiting: &[(&str, Option<f64>)]| {
            starts(&stays(held), room(9, per_device), &stays(waiting))
        };
        // Two places: one is free in 10 s, one at once.
        let two = found(&on(&[10.0]), 2, &on(&[4.0, 3.0, 5.0, 1.0]));
        assert_eq!(two, known(&[0.0, 4.0, 7.0, 10.0]));
        // Nobody knows when the one place is free.
        assert_eq!(found(&[("cpu", None)], 1, &on(&[1.0])), [None]);
        // One is free at once, the other some time: only the first start is known.
        let one = found(&[("cpu", None)], 2, &on(&[1.0, 1.0]));
        assert_eq!(one, [Some(0.0), None]);
        // How long the first takes is not known.
        let first = found(&[], 1, &[("cpu", None), ("cpu", Some(1.0))]);
        assert_eq!(first, [Some(0.0), None]);
        // Three runs are held, one may run: all have to end first.
        assert_eq!(found(&on(&[5.0, 1.0, 9.0]), 1, &on(&[1.0])), known(&[9.0]));
        assert!(found(&[], 1, &[]).is_empty());
    }

    #[test]
    fn devices_do_not_wait_for_each_other() {
        let held = stays(&[("cpu", None)]);
        let waiting = stays(&[("cpu", Some(1.0)), ("gpu", Some(2.0)), ("gpu", Some(2.0))]);
        let found = starts(&held, room(9, 1), &waiting);
        assert_eq!(found, [None, Some(0.0), Some(2.0)]);
        // Two on all devices together: the second on the GPU may have to wait for the CPU's.
        let found = starts(&held, room(2, 1), &waiting);
        assert_eq!(found, [None, Some(0.0), None]);
        let mut used = Used::new(room(2, 1));
        used.take(Some("cpu"));
        assert!(!used.has_room(Some("cpu")) && used.has_room(Some("gpu")));
        used.take(Some("gpu"));
        assert!(!used.has_room(Some("another")));
    }
}
