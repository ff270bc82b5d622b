//! The queries of runs against a real database file.

use std::time::Duration;

use tempfile::TempDir;
use uuid::Uuid;

use super::{Lease, Metric, NewRun, Progress, RunFilter, RunState, WorkerReport};
use crate::store::{Store, StoreError};

const LEASE: Duration = Duration::from_secs(20);

/// A store, and a run that `worker` has taken.
async fn claimed() -> (TempDir, Store, Uuid) {
    let folder = tempfile::tempdir().expect("a folder");
    let url = format!("sqlite://{}?mode=rwc", folder.path().join("db").display());
    let store = Store::open(&url, folder.path()).await.expect("a store");
    let dataset = store.create_dataset("a").await.expect("made").id;
    let run = store.create_run(NewRun {
        name: "run".to_owned(),
        spec: "{}".to_owned(),
        images: "[1]".to_owned(),
        dataset_id: dataset,
        base_model_id: "m".to_owned(),
    });
    let id = run.await.expect("made").id;
    let run = store.claim_run(id, "worker", 7, LEASE).await;
    let run = run.expect("claimed").expect("queued");
    assert_eq!((run.state, run.attempt), (RunState::Preparing, 1));
    (folder, store, id)
}

fn steps(metrics: Vec<Metric>) -> WorkerReport {
    WorkerReport {
        metrics,
        ..WorkerReport::default()
    }
}

#[tokio::test]
async fn parts_of_a_run_are_those_of_the_whole() {
    let (_folder, store, id) = claimed().await;
    let run = store.run(id).await.expect("there");
    assert_eq!((run.spec.as_str(), run.worker_pid), ("{}", Some(7)));
    assert_eq!(store.run_state(id).await.expect("there"), run.state);
    assert_eq!(store.run_images(id).await.expect("there"), "[1]");
    let all = store.runs(RunFilter::default(), None, 9).await;
    let held = store.runs_in(&[RunState::Preparing]).await;
    for list in [all, held] {
        assert_eq!(list.expect("a list"), std::slice::from_ref(&run));
    }
    let nobody = Uuid::now_v7();
    for missing in [
        store.run_state(nobody).await.err(),
        store.run_images(nobody).await.err(),
        store.run(nobody).await.err(),
    ] {
        assert!(matches!(missing, Some(StoreError::NotFound)));
    }
}

#[tokio::test]
async fn a_lease_is_renewed_by_its_owner_who_hears_of_the_end() {
    let (_folder, store, id) = claimed().await;
    let renew = async |owner| store.renew_lease(id, owner, LEASE).await.expect("asked");
    let held = |cancel_requested| Lease::Held { cancel_requested };
    assert_eq!(renew("worker").await, held(false));
    assert_eq!(renew("another").await, Lease::Lost);
    store.request_cancel(id).await.expect("noted");
    assert_eq!(renew("worker").await, held(true));
    let from = [RunState::Preparing];
    let moved = store.move_run(id, &from, RunState::Interrupted, None).await;
    assert!(moved.expect("moved"));
    assert_eq!(renew("worker").await, Lease::Lost);
}

#[tokio::test]
async fn a_step_and_its_validation_are_one_row() {
    let (_folder, store, id) = claimed().await;
    let record = async |owner, report| store.record(id, owner, report).await.expect("written");
    let step = |step, loss| Metric {
        step,
        epoch: 1,
        loss: Some(loss),
        ..Metric::default()
    };
    let validation = Metric {
        step: 2,
        validation_loss: Some(0.25),
        ..Metric::default()
    };
    let first = WorkerReport {
        progress: Some(Progress {
            step: 2,
            total_steps: Some(9),
            ..Progress::default()
        }),
        phase: Some("training".to_owned()),
        events: vec![("progress".to_owned(), serde_json::json!({"step": 2}))],
        ..steps(vec![step(1, 0.75), step(2, 0.5)])
    };
    assert!(record("worker", first).await);
    assert!(record("worker", steps(vec![validation.clone()])).await);
    assert!(!record("another", steps(vec![step(3, 1.0)])).await);

    let found = store.metrics(id, None, None, 9).await.expect("a list");
    let both = Metric {
        validation_loss: validation.validation_loss,
        ..step(2, 0.5)
    };
    assert_eq!(found, [step(1, 0.75), both]);
    let run = store.run(id).await.expect("there");
    assert_eq!((run.step, run.total_steps), (2, Some(9)));
    assert_eq!(run.phase.as_deref(), Some("training"));
    let events = store.events(id, 2, 9).await.expect("a list");
    let told: Vec<_> = events.iter().map(|event| event.kind.as_str()).collect();
    assert_eq!(told, ["progress"]);
}
