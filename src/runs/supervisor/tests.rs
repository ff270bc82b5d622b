//! Turns of the supervisor over rows that tests write, with a clock that they set.

use serde_json::json;

use super::*;
use crate::runs::liveness::{self, Alive};
use crate::runs::worker::LEASE;
use crate::store::runs::{Claim, Lease, NewRun, WorkerReport};
use crate::store::testing::{jump_clock, store};

const HOUR_MS: i64 = 60 * 60 * 1000;

fn supervisor(store: &Store) -> Loop {
    Loop {
        store: store.clone(),
        command: WorkerCommand {
            program: PathBuf::from("no such program"),
            arguments: Vec::new(),
            environment: Vec::new(),
            removed: Vec::new(),
            log_dir: store.data_dir().join("logs"),
            room: queue::room(9, 9),
            farewell: Duration::ZERO,
        },
        wake: Arc::default(),
        children: HashMap::new(),
        seen: HashMap::new(),
        false_starts: HashMap::new(),
        begun: HashMap::new(),
        looked_for_room: None,
    }
}

async fn queued(store: &Store) -> Uuid {
    let dataset = store.create_dataset("a").await.expect("made").id;
    let run = store.create_run(NewRun {
        id: Uuid::now_v7(),
        name: "run".to_owned(),
        spec: "{}".to_owned(),
        images: "[]".to_owned(),
        dataset_id: dataset,
        base_model_id: "m".to_owned(),
        ..NewRun::default()
    });
    run.await.expect("made").id
}

/// A run that the worker `owner` of a machine has taken.
async fn held(store: &Store, owner: &str, host: Option<&str>) -> Uuid {
    let id = queued(store).await;
    let claim = store.claim_run(id, owner, 1, host, LEASE, queue::room(9, 9));
    assert!(matches!(claim.await, Ok(Claim::Taken(_))));
    id
}

#[tokio::test]
async fn a_clock_that_jumps_does_no_harm() {
    let (_scratch, store) = store().await;
    let mut supervisor = supervisor(&store);
    let host = liveness::host();
    // One worker is on this machine, where its lock tells that it lives, and one elsewhere, where only its lease does.
    let here = held(&store, "here", host.as_deref()).await;
    let _alive = Alive::begin(&store.run_folder(here), "here");
    let elsewhere = held(&store, "elsewhere", Some("another machine")).await;
    let mut waiting = vec![queued(&store).await];
    for (jump, number) in [24 * HOUR_MS, -48 * HOUR_MS, HOUR_MS, -HOUR_MS]
        .into_iter()
        .zip(1..)
    {
        supervisor.reconcile().await.expect("a working database");
        jump_clock(jump);
        waiting.push(queued(&store).await);
        supervisor.reconcile().await.expect("a working database");
        for (id, owner) in [(here, "here"), (elsewhere, "elsewhere")] {
            let state = store.run_state(id).await.expect("there");
            assert_eq!(state, RunState::Preparing, "{owner} after {jump} ms");
            let renewed = store.renew_lease(id, owner, LEASE).await.expect("asked");
            assert!(matches!(renewed, Lease::Held { .. }));
            let report = WorkerReport {
                events: vec![("progress".to_owned(), json!({"step": number}))],
                ..WorkerReport::default()
            };
            assert!(store.record(id, owner, report).await.expect("written"));
        }
        supervisor.reconcile().await.expect("a working database");
    }
    // Events are in the order in which they were written, whatever their times say.
    let events = store.events(here, 0, 99).await.expect("events");
    let numbers: Vec<u64> = events.iter().map(|event| event.seq).collect();
    assert_eq!(numbers, (1..=events.len() as u64).collect::<Vec<_>>());
    assert!(!events.is_sorted_by_key(|event| event.created_at));
    let told = events.iter().filter(|event| event.kind == "progress");
    let steps: Vec<_> = told.map(|event| event.data["step"].clone()).collect();
    assert_eq!(steps, [1, 2, 3, 4]);
    // So are waiting runs.
    let order = queue::order(
        store.runs_in(&[RunState::Queued]).await.expect("a list"),
        store.turns().await.expect("turns"),
    );
    assert_eq!(order.iter().map(|run| run.id).collect::<Vec<_>>(), waiting);
    assert!(!order.is_sorted_by_key(|run| run.created_at));
}

#[tokio::test]
async fn a_worker_elsewhere_is_given_up_after_its_lease_by_our_own_time() {
    let (_scratch, store) = store().await;
    let mut supervisor = supervisor(&store);
    let id = held(&store, "elsewhere", Some("another machine")).await;
    supervisor.reconcile().await.expect("a working database");
    let (_, since) = supervisor.seen.get_mut(&id).expect("seen");
    *since = since.checked_sub(LEASE).expect("up for so long");
    // A sign of life comes just in time. What it says differs from what was said before, however long that took.
    jump_clock(-10_000);
    store
        .renew_lease(id, "elsewhere", LEASE)
        .await
        .expect("renewed");
    supervisor.reconcile().await.expect("a working database");
    assert_eq!(
        store.run_state(id).await.expect("there"),
        RunState::Preparing
    );
    let (_, since) = supervisor.seen.get_mut(&id).expect("seen");
    *since = since.checked_sub(LEASE).expect("up for so long");
    supervisor.reconcile().await.expect("a working database");
    let run = store.run(id).await.expect("there");
    assert_eq!(
        (run.state, run.keeps_turn, run.lease),
        (RunState::Queued, true, None)
    );
}

#[tokio::test]
async fn a_program_that_cannot_be_started_fails_one_run_and_not_the_queue() {
    let (_scratch, store) = store().await;
    let mut supervisor = supervisor(&store);
    let runs = [queued(&store).await, queued(&store).await];
    supervisor.turn().await.expect("a working database");
    for id in runs {
        let run = store.run(id).await.expect("there");
        assert_eq!(run.error_code.as_deref(), Some("worker_not_started"));
    }
    assert!(supervisor.children.is_empty());
}
