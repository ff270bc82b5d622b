//! What happens in a run, read from the database once for all clients that watch it.
//!
//! A thousand streams that each looked at the rows would leave no time for anything else. Here one task per watched run
//! does, and keeps the newest events as they are sent; who is further behind reads rows.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use actix_web::web::Bytes;
use tokio::sync::watch;
use uuid::Uuid;

use crate::runs::state;
use crate::store::runs::Event;
use crate::store::{Store, StoreError};

/// How often rows are looked at.
const POLL: Duration = Duration::from_millis(100);
/// The pause after the database did not answer.
const PAUSE: Duration = Duration::from_secs(1);
/// Events read at once.
const BATCH: u64 = 500;
/// How many events are kept for those who are a little behind.
const KEPT: usize = 128;

/// An event as it goes over the wire.
#[derive(Clone, Debug)]
pub struct Frame {
    /// The event's number.
    pub seq: u64,
    /// Its text; shared, not copied.
    pub text: Bytes,
}

impl From<&Event> for Frame {
    fn from(event: &Event) -> Self {
        let text = format!(
            "id: {}\nevent: {}\ndata: {}\n\n",
            event.seq, event.kind, event.data
        );
        Self {
            seq: event.seq,
            text: text.into(),
        }
    }
}

/// The newest events of a run.
#[derive(Clone, Debug, Default)]
pub struct Tail {
    frames: VecDeque<Frame>,
    /// The number of the newest event that was read.
    newest: u64,
    /// Nothing comes after `newest`.
    ended: bool,
}

/// What a tail knows of what comes after an event.
#[derive(Debug)]
pub enum After {
    /// These.
    Frames(VecDeque<Frame>),
    /// More than it has kept; the rows know.
    Rows,
    /// Nothing yet.
    Nothing,
    /// Nothing, ever.
    End,
}

impl Tail {
    /// What comes after the event of this number.
    pub fn after(&self, last: u64) -> After {
        if last >= self.newest {
            return if self.ended {
                After::End
            } else {
                After::Nothing
            };
        }
        match self.frames.front() {
            Some(first) if first.seq <= last + 1 => {
                let newer = self.frames.iter().filter(|frame| frame.seq > last);
                After::Frames(newer.cloned().collect())
            }
            _ => After::Rows,
        }
    }

    fn add(&mut self, events: &[Event]) {
        self.frames.extend(events.iter().map(Frame::from));
        let excess = self.frames.len().saturating_sub(KEPT);
        self.frames.drain(..excess);
        self.newest = events.last().map_or(self.newest, |event| event.seq);
    }
}

/// The feeds of all runs that somebody watches.
#[derive(Clone)]
pub struct EventFeed {
    store: Store,
    runs: Arc<Mutex<HashMap<Uuid, watch::Receiver<Tail>>>>,
}

impl EventFeed {
    /// Without anything to do yet.
    pub fn new(store: Store) -> Self {
        Self {
            store,
            runs: Arc::default(),
        }
    }

    /// Watches a run; `last` is the number of an event that was read already.
    ///
    /// The receiver fails when its task is gone: subscribe again then.
    pub fn subscribe(&self, run_id: Uuid, last: u64) -> watch::Receiver<Tail> {
        let mut runs = self.runs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(feed) = runs.get(&run_id)
            && feed.has_changed().is_ok()
        {
            return feed.clone();
        }
        let (sender, feed) = watch::channel(Tail {
            newest: last,
            ..Tail::default()
        });
        runs.insert(run_id, feed.clone());
        actix_web::rt::spawn(self.clone().read(run_id, sender));
        feed
    }

    /// Reads a run's events until it has ended or nobody listens.
    async fn read(self, run_id: Uuid, sender: watch::Sender<Tail>) {
        loop {
            let last = sender.borrow().newest;
            match self.look(run_id, last).await {
                Ok((events, ended)) => {
                    let all = (events.len() as u64) < BATCH;
                    if !events.is_empty() || ended {
                        sender.send_modify(|tail| {
                            tail.add(&events);
                            tail.ended = ended && all;
                        });
                    }
                    if ended && all {
                        return self.forget(run_id);
                    }
                    if !all {
                        continue;
                    }
                    tokio::time::sleep(POLL).await;
                }
                Err(StoreError::NotFound) => {
                    sender.send_modify(|tail| tail.ended = true);
                    return self.forget(run_id);
                }
                Err(error) => {
                    tracing::warn!(%error, %run_id, "events cannot be read");
                    tokio::time::sleep(PAUSE).await;
                }
            }
            let mut runs = self.runs.lock().unwrap_or_else(PoisonError::into_inner);
            // The map holds one; under its lock nobody comes to listen.
            if sender.receiver_count() <= 1 {
                runs.remove(&run_id);
                return;
            }
        }
    }

    async fn look(&self, run_id: Uuid, last: u64) -> Result<(Vec<Event>, bool), StoreError> {
        // The state is read before the events: what a run's end has written is then among them.
        let state = self.store.run_state(run_id).await?;
        let events = self.store.events(run_id, last, BATCH).await?;
        Ok((events, state::has_ended(state)))
    }

    fn forget(&self, run_id: Uuid) {
        let mut runs = self.runs.lock().unwrap_or_else(PoisonError::into_inner);
        runs.remove(&run_id);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use time::OffsetDateTime;

    use super::*;

    fn events(numbers: std::ops::RangeInclusive<u64>) -> Vec<Event> {
        let event = |seq| Event {
            seq,
            kind: "progress".to_owned(),
            data: json!({"step": seq}),
            created_at: OffsetDateTime::UNIX_EPOCH,
        };
        numbers.map(event).collect()
    }

    #[test]
    fn a_tail_knows_what_it_has_kept() {
        let mut tail = Tail::default();
        assert!(matches!(tail.after(0), After::Nothing));
        tail.add(&events(1..=3));
        let After::Frames(frames) = tail.after(1) else {
            panic!("known");
        };
        let numbers: Vec<u64> = frames.iter().map(|frame| frame.seq).collect();
        assert_eq!(numbers, [2, 3]);
        assert_eq!(
            frames[0].text,
            "id: 2\nevent: progress\ndata: {\"step\":2}\n\n"
        );
        assert!(matches!(tail.after(3), After::Nothing));
        tail.add(&events(4..=3 + KEPT as u64));
        assert!(matches!(tail.after(1), After::Rows));
        assert!(matches!(tail.after(3), After::Frames(frames) if frames.len() == KEPT));
        tail.ended = true;
        assert!(matches!(tail.after(3 + KEPT as u64), After::End));
        assert!(matches!(tail.after(2), After::Rows));
    }
}
