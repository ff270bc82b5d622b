//! Which state of a run may follow which.

use crate::store::runs::RunState;
use RunState::{
    Cancelled, Cancelling, Failed, Interrupted, Preparing, Queued, Running, Saving, Succeeded,
};

/// States in which a worker holds the run.
pub const HELD: [RunState; 4] = [Preparing, Running, Saving, Cancelling];

/// States that never change again.
pub const ENDED: [RunState; 3] = [Succeeded, Failed, Cancelled];

/// Whether a run never changes again.
pub fn has_ended(state: RunState) -> bool {
    ENDED.contains(&state)
}

/// The states from which `to` may be reached.
pub fn before(to: RunState) -> &'static [RunState] {
    match to {
        Queued => &[Interrupted],
        Preparing => &[Queued],
        Running => &[Preparing],
        Saving => &[Running],
        Cancelling | Interrupted => &[Preparing, Running, Saving],
        Succeeded => &[Saving],
        Failed => &[Queued, Preparing, Running, Saving, Cancelling, Interrupted],
        Cancelled => &[Queued, Cancelling, Interrupted],
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
                Queued => &[Preparing, Failed, Cancelled],
                Preparing => &[Running, Cancelling, Interrupted, Failed],
                Running => &[Saving, Cancelling, Interrupted, Failed],
                Saving => &[Cancelling, Interrupted, Succeeded, Failed],
                Cancelling => &[Failed, Cancelled],
                Interrupted => &[Queued, Failed, Cancelled],
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
}
