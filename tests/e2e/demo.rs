//! The demo learns.

use lorasmith::demo::{self, DemoOptions};

use crate::server::root;

/// The mascot is learned: the loss on held-out pictures falls to at most half.
#[test]
fn the_demo_learns_the_mascot() {
    let folder = tempfile::tempdir().expect("a folder");
    let report = demo::run(&DemoOptions {
        output: folder.path().to_owned(),
        assets: Some(root().join("examples/demo")),
        steps: 400,
        device: "cpu".to_owned(),
        quiet: true,
    })
    .expect("the demo");
    assert!(report.ratio() <= 0.5, "{report}");
    for file in [&report.lora, &report.sheet, &report.plot, &report.script] {
        assert!(
            file.metadata().expect("written").len() > 500,
            "{}",
            file.display()
        );
    }
    let script = std::fs::read_to_string(&report.script).expect("a script");
    for call in ["/v1/datasets", "/v1/runs", "/content", "if-match"] {
        assert!(script.contains(call), "{call}");
    }
}
