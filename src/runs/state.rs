//! Which state of a run may follow which. Nothing else decides that.

use crate::store::runs::RunState;
use RunState::{
    Cancelled, Cancelling, Failed, Interrupted, Paused, Pausing, Preparing, Queued, Running,
    Saving, Succeeded,
};

/// States in which a worker holds the run.
pub const HELD: [RunState; 5] = [Preparing, Running, Saving, Pausing, Cancelling];

/// States that never change again.
pub const ENDED: [RunState; 3] = [Succeeded, Failed, Cancelled];

/// Whether a run never changes again.
pub fn has_ended(state: RunState) -> bool {
    ENDED.contains(&state)
}

/// The states from which `to` may be reached.
pub fn before(to: RunState) -> &'static [RunState] {
    match to {
        Queued => &[Interrupted, Paused],
        Preparing => &[Queued],
        Running => &[Preparing],
        // A wish to pause can come after the last step: there is nothing left to pause.
        Saving => &[Running, Pausing],
        Pausing => &[Preparing, Running],
        // A run without a worker is paused at once.
        Paused => &[Queued, Interrupted, Pausing],
        Cancelling => &[Preparing, Running, Saving, Pausing],
        Interrupted => &[Preparing, Running, Saving],
        Succeeded => &[Saving],
        Failed => &[
            Queued,
            Preparing,
            Running,
            Saving,
            Pausing,
            Cancelling,
            Interrupted,
        ],
        Cancelled => &[Queued, Interrupted, Paused, Cancelling],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The whole table, written out from the other side.
    #[test]
    fn every_transition_is_decided() {
        let after = |from: RunState| -> &[RunState] {
            match from {
                Queued => &[Preparing, Paused, Failed, Cancelled],
                Preparing => &[Running, Pausing, Cancelling, Interrupted, Failed],
                Running => &[Saving, Pausing, Cancelling, Interrupted, Failed],
                Saving => &[Cancelling, Interrupted, Succeeded, Failed],
                Pausing => &[Saving, Paused, Cancelling, Failed],
                Paused => &[Queued, Cancelled],
                Cancelling => &[Failed, Cancelled],
                Interrupted => &[Queued, Paused, Failed, Cancelled],
                Succeeded | Failed | Cancelled => &[],
            }
        };
        for from in RunState::ALL {
            for to in RunState::ALL {
                let allowed = before(to).contains(&from);
                assert_eq!(allowed, after(from).contains(&to), "{from:?} to {to:?}");
            }
        }
    }

    #[test]
    fn each_state_is_reachable_and_each_lasting_one_is_left() {
        for state in RunState::ALL {
            if state != Queued {
                assert!(!before(state).is_empty(), "{state:?}");
            }
            let left = RunState::ALL.iter().any(|to| before(*to).contains(&state));
            assert_eq!(left, !has_ended(state), "{state:?}");
        }
    }

    /// Whoever holds a run can be told to leave it, and a run that nobody holds ends at once.
    #[test]
    fn every_run_can_be_ended_in_at_most_two_moves() {
        for state in RunState::ALL {
            if has_ended(state) {
                continue;
            }
            let at_once = before(Cancelled).contains(&state);
            let by_its_worker = before(Cancelling).contains(&state);
            assert!(at_once != by_its_worker, "{state:?}");
            assert_eq!(
                HELD.contains(&state),
                by_its_worker || state == Cancelling,
                "{state:?}"
            );
        }
    }
}
