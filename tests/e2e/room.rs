//! No room to write to: a run waits in a clear state, nothing is corrupt, and it goes on when there is room.

use std::process::Command;

use serde_json::{Value, json};

use crate::server::{PROGRAM, Server, root};

/// Larger than the database and its journal, smaller than a resume point of the run below; in blocks of 512 bytes.
const LIMIT_BLOCKS: u32 = 12 << 11;

/// Files may not grow beyond a limit, as on a disk that is full; then they may.
#[test]
fn a_run_without_room_waits_and_goes_on() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut shell = Command::new("sh");
    // A write beyond the limit is to fail; it would end the process otherwise.
    let script = format!("trap '' XFSZ; ulimit -S -f {LIMIT_BLOCKS}; exec {PROGRAM} \"$@\"");
    shell.args(["-c", &script, "sh"]);
    let server = Server::run(shell, folder.path(), &root().join("examples/demo"));
    let dataset = server.make_dataset();
    let large = json!({"network": {"rank": 128, "alpha": 4.0}, "resume": {"every_n_steps": 2}});
    let run = server.start_run_on(&dataset, 3, &large);
    let waiting = server.wait(&run, "without room", |run| {
        run["state"] == "failed" || !run["waiting_for"].is_null()
    });
    assert_eq!(waiting["state"], "interrupted", "{waiting}");
    assert_eq!(waiting["waiting_for"]["code"], "storage_full");
    assert_eq!(
        (&waiting["error"], &waiting["resumable_step"]),
        (&Value::Null, &Value::Null)
    );
    assert_eq!(server.ask("GET", "/readyz", None).0, 200);
    let status = Command::new("prlimit")
        .args([
            "--pid",
            &server.process.id().to_string(),
            "--fsize=unlimited",
        ])
        .status();
    assert!(status.expect("prlimit").success());
    let end = server.wait(&run, "at its end", |run| {
        run["state"] == "failed" || run["state"] == "succeeded"
    });
    assert_eq!(end["state"], "succeeded", "{end}");
    let steps: Vec<u64> = server.losses(&run).iter().map(|(step, _)| *step).collect();
    assert_eq!(steps, (1..=3).collect::<Vec<u64>>());

    // To the bit what it would have been.
    let whole = server.start_run_on(&dataset, 3, &large);
    let whole = server.wait(&whole, "succeeded", |run| run["state"] == "succeeded");
    assert_eq!(server.result(&end), server.result(&whole));
}
