//! The queries of runs against a real database file.

use std::time::Duration;

use uuid::Uuid;

use super::{
    Claim, Lease, Metric, NewLora, NewRun, NewSample, Progress, Room, RunFilter, RunState, Wish,
    WorkerReport,
};
use crate::store::testing::{Scratch, store};
use crate::store::{Store, StoreError};

const LEASE: Duration = Duration::from_secs(20);

const ROOM: Room = Room {
    runs: 9,
    per_device: 9,
    held: &[RunState::Preparing, RunState::Running],
};

/// A run on a new dataset.
async fn queued(store: &Store, api_key_id: Option<Uuid>, device: Option<&str>) -> Uuid {
    let dataset = store.create_dataset("a").await.expect("made").id;
    let run = store.create_run(NewRun {
        id: Uuid::now_v7(),
        name: "run".to_owned(),
        spec: "{}".to_owned(),
        images: "[1]".to_owned(),
        dataset_id: dataset,
        base_model_id: "m".to_owned(),
        api_key_id,
        wanted_device: device.map(str::to_owned),
        ..NewRun::default()
    });
    run.await.expect("made").id
}

async fn claim(store: &Store, id: Uuid, owner: &str, room: Room) -> Claim {
    let claimed = store.claim_run(id, owner, 7, Some("here"), LEASE, room);
    claimed.await.expect("a working database")
}

/// A store, and a run that `worker` has taken.
async fn claimed() -> (Scratch, Store, Uuid) {
    let (scratch, store) = store().await;
    let id = queued(&store, None, None).await;
    let Claim::Taken(run) = claim(&store, id, "worker", ROOM).await else {
        panic!("it was queued");
    };
    assert_eq!((run.state, run.attempt), (RunState::Preparing, 1));
    (scratch, store, id)
}

#[tokio::test]
async fn claims_at_once_find_the_room_that_there_is() {
    let (scratch, store) = store().await;
    let other = scratch.store().await;
    let room = Room {
        per_device: 1,
        ..ROOM
    };
    for _ in 0..5 {
        let a = queued(&store, None, Some("cpu")).await;
        let b = queued(&store, None, Some("cpu")).await;
        let gpu = queued(&store, None, Some("vulkan:0")).await;
        let (one, two, third) = tokio::join!(
            claim(&store, a, "one", room),
            claim(&other, b, "two", room),
            claim(&other, gpu, "three", room)
        );
        let cpu = [&one, &two].map(|claim| matches!(claim, Claim::Taken(_)));
        assert!(cpu[0] != cpu[1], "{one:?} and {two:?}");
        assert!([one, two].contains(&Claim::NoRoom));
        assert!(matches!(third, Claim::Taken(_)), "devices are apart");
        // Of several workers of one run one has it.
        for id in [a, b, gpu] {
            let from = [RunState::Queued, RunState::Preparing];
            store
                .move_run(id, &from, RunState::Queued, None)
                .await
                .expect("moved");
        }
        let (one, two) = tokio::join!(
            claim(&store, a, "four", ROOM),
            claim(&other, a, "five", ROOM)
        );
        assert!([one, two].contains(&Claim::NotQueued));
        for id in [a, b, gpu] {
            store
                .move_run(id, &RunState::ALL, RunState::Failed, None)
                .await
                .expect("moved");
        }
    }
    let all = Room { runs: 0, ..ROOM };
    let id = queued(&store, None, None).await;
    assert_eq!(claim(&store, id, "six", all).await, Claim::NoRoom);
}

#[tokio::test]
async fn turns_and_numbers_grow_whatever_the_clock_says() {
    let (_scratch, store) = store().await;
    let [a, b] = [Some(Uuid::now_v7()), Some(Uuid::now_v7())];
    let mut runs = Vec::new();
    for key in [a, a, b, None] {
        runs.push(queued(&store, key, None).await);
    }
    let mut numbers = Vec::new();
    for id in &runs {
        numbers.push(store.run(*id).await.expect("there").number);
    }
    assert_eq!(numbers, [1, 2, 3, 4]);
    let last = async |keys: [Option<Uuid>; 3]| {
        let turns = store.turns().await.expect("turns");
        keys.map(|key| turns.last(key))
    };
    assert_eq!(last([a, b, None]).await, [0, 0, 0]);
    for (id, expected) in [
        (runs[2], [0, 1, 0]),
        (runs[0], [2, 1, 0]),
        (runs[3], [2, 1, 3]),
        (runs[1], [4, 1, 3]),
    ] {
        claim(&store, id, "x", ROOM).await;
        assert_eq!(last([a, b, None]).await, expected);
    }
    // What has lost its worker keeps its turn, what was paused does not.
    let go = async |from, to| {
        store
            .move_run(runs[0], &[from], to, None)
            .await
            .expect("moved");
        store.run(runs[0]).await.expect("there").keeps_turn
    };
    assert!(!go(RunState::Preparing, RunState::Interrupted).await);
    assert!(go(RunState::Interrupted, RunState::Queued).await);
    assert!(!go(RunState::Queued, RunState::Paused).await);
    assert!(!go(RunState::Paused, RunState::Queued).await);
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
    let worker = run.lease.clone().expect("held");
    assert_eq!(run.spec, "{}");
    assert_eq!(
        (worker.owner.as_str(), worker.pid, worker.host.as_deref()),
        ("worker", Some(7), Some("here"))
    );
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
    let held = |wishes: &[Wish]| Lease::Held {
        wishes: wishes.to_vec(),
    };
    assert_eq!(renew("worker").await, held(&[]));
    assert_eq!(renew("another").await, Lease::Lost);
    for wish in [Wish::Sample, Wish::Cancel, Wish::Cancel] {
        store.request(id, wish).await.expect("noted");
    }
    assert_eq!(renew("worker").await, held(&[Wish::Cancel, Wish::Sample]));
    let report = WorkerReport {
        fulfilled: vec![Wish::Sample],
        ..WorkerReport::default()
    };
    assert!(store.record(id, "worker", report).await.expect("written"));
    assert_eq!(renew("worker").await, held(&[Wish::Cancel]));
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

/// Moves a worker's run on as its loss does, and gives it to the next worker.
async fn lose(store: &Store, id: Uuid, worker: &str) -> u32 {
    let stalls = store.judge_lost_worker(id).await.expect("judged");
    for (from, to) in [
        (RunState::Preparing, RunState::Interrupted),
        (RunState::Interrupted, RunState::Queued),
    ] {
        assert!(store.move_run(id, &[from], to, None).await.expect("moved"));
    }
    let claimed = claim(store, id, worker, ROOM).await;
    assert!(matches!(claimed, Claim::Taken(_)));
    stalls
}

#[tokio::test]
async fn workers_that_do_not_come_further_are_counted() {
    let (_folder, store, id) = claimed().await;
    let reach = async |owner: &str, step, kept_step| {
        let report = WorkerReport {
            progress: Some(Progress {
                step,
                ..Progress::default()
            }),
            kept_step,
            ..WorkerReport::default()
        };
        assert!(store.record(id, owner, report).await.expect("written"));
    };
    assert_eq!(lose(&store, id, "b").await, 0, "the first has no measure");
    assert_eq!(lose(&store, id, "c").await, 1);
    reach("c", 5, None).await;
    assert_eq!(lose(&store, id, "d").await, 0, "a further step");
    reach("d", 4, None).await;
    assert_eq!(lose(&store, id, "e").await, 1, "the same steps again");
    reach("e", 4, Some(3)).await;
    assert_eq!(lose(&store, id, "f").await, 0, "a resume point");
    assert_eq!(lose(&store, id, "g").await, 1);
    assert_eq!(lose(&store, id, "h").await, 2);
    assert_eq!(store.run(id).await.expect("there").furthest_step, 5);
}

/// A worker that does the steps of a dead one again replaces its rows and adds none.
#[tokio::test]
async fn results_that_are_made_again_are_no_new_rows() {
    let (_folder, store, id) = claimed().await;
    let results = |sha256: &str| {
        let id = Uuid::now_v7;
        let (sha256, size_bytes) = (sha256.to_owned(), 7);
        WorkerReport {
            metrics: vec![Metric {
                step: 3,
                loss: Some(size_bytes as f64),
                ..Metric::default()
            }],
            samples: vec![NewSample {
                id: id(),
                step: 3,
                prompt_index: 0,
                prompt: "a".to_owned(),
                seed: 1,
                width_px: 8,
                height_px: 8,
                sha256: sha256.clone(),
                size_bytes,
            }],
            loras: vec![NewLora {
                id: id(),
                file_name: "a.safetensors".to_owned(),
                step: 3,
                epoch: 1,
                is_final: false,
                sha256: sha256.clone(),
                size_bytes,
                validation: None,
                self_check: None,
            }],
            events: vec![("lora".to_owned(), serde_json::json!({"sha256": sha256}))],
            ..WorkerReport::default()
        }
    };
    let found = async || {
        let samples = store.samples(id, None, 9).await.expect("a list");
        let loras = store.loras(Some(id), None, 9).await.expect("a list");
        assert_eq!((samples.len(), loras.len()), (1, 1));
        (samples[0].clone(), loras[0].clone())
    };
    let write = async |worker, report| store.record(id, worker, report).await.expect("written");
    assert!(write("worker", results("aa")).await);
    let first = found().await;
    lose(&store, id, "another").await;
    let told = store.told(id).await.expect("told");
    assert_eq!(told.results.len(), 1);
    assert_eq!(told.results[0].1["sha256"], "aa");
    assert!(!write("worker", results("cc")).await, "no longer its own");
    assert!(write("another", results("bb")).await);
    let again = found().await;
    assert_eq!((again.0.id, again.1.id), (first.0.id, first.1.id));
    assert_eq!(
        (again.0.sha256.as_str(), again.1.sha256.as_str()),
        ("bb", "bb")
    );
    assert_eq!(
        store
            .metrics(id, None, None, 9)
            .await
            .expect("a list")
            .len(),
        1
    );
}

/// Whatever is asked of a run that has ended, it stays as it is.
#[tokio::test]
async fn an_end_is_final() {
    for end in [RunState::Succeeded, RunState::Failed, RunState::Cancelled] {
        let (_folder, store, id) = claimed().await;
        let from = [RunState::Preparing];
        assert!(store.move_run(id, &from, end, None).await.expect("moved"));
        let ended = store.run(id).await.expect("there");
        let from: Vec<RunState> = RunState::ALL
            .into_iter()
            .filter(|state| *state != end)
            .collect();
        for to in RunState::ALL {
            assert!(!store.move_run(id, &from, to, None).await.expect("asked"));
        }
        assert!(
            !store
                .record(id, "worker", WorkerReport::default())
                .await
                .expect("asked")
        );
        assert_eq!(claim(&store, id, "x", ROOM).await, Claim::NotQueued);
        assert_eq!(store.run(id).await.expect("there"), ended);
    }
}
