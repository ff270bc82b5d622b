//! Decodes what nobody has decoded yet in a process that may end: AVIF's decoder ends its process where it panics, and
//! the service is not to end. What has passed is decoded anywhere, as the same bytes give the same picture.

use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::limits::Limits;
use super::pictures::{self, Findings};

/// How long one file may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// Bytes of an answer.
const MAX_ANSWER_BYTES: u64 = 16 << 10;

/// The program whose command `examine-picture` is [`answer`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trial {
    pub program: PathBuf,
}

/// What became of a trial.
#[derive(Debug, thiserror::Error)]
pub enum TrialError {
    #[error("{message}")]
    Refused { code: String, message: String },
    #[error("{0}")]
    Ended(String),
    #[error("starting the decoder's process: {0}")]
    Io(#[from] io::Error),
}

/// One line on standard output.
#[derive(Serialize, Deserialize)]
enum Answer {
    Found(Findings),
    Refused { code: String, message: String },
}

impl Trial {
    /// Decodes a file in a process of its own.
    ///
    /// # Errors
    /// With the reason, when the file is refused, or the process has ended without an answer.
    pub fn examine(&self, path: &Path, limits: &Limits) -> Result<Findings, TrialError> {
        let mut child = Command::new(&self.program)
            .arg("examine-picture")
            .arg("--pixels")
            .arg(limits.image_pixels.to_string())
            .arg(path)
            .env_remove("LORASMITH_API_KEY")
            .env_remove("LORASMITH_DATABASE_URL")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let ended = wait(&mut child)?;
        if !ended {
            return Err(TrialError::Ended(format!(
                "the decoder was not done after {} s",
                PATIENCE.as_secs()
            )));
        }
        let mut answer = String::new();
        if let Some(output) = child.stdout.take() {
            output.take(MAX_ANSWER_BYTES).read_to_string(&mut answer)?;
        }
        match serde_json::from_str(&answer) {
            Ok(Answer::Found(findings)) => Ok(findings),
            Ok(Answer::Refused { code, message }) => Err(TrialError::Refused { code, message }),
            Err(_) => Err(TrialError::Ended("the decoder gave up".to_owned())),
        }
    }
}

/// Whether it has ended in time; an answer fits into a pipe, so that nobody has to read meanwhile.
fn wait(child: &mut Child) -> io::Result<bool> {
    let mut pause = Duration::from_millis(2);
    let begun = Instant::now();
    while child.try_wait()?.is_none() {
        if begun.elapsed() > PATIENCE {
            child.kill()?;
            child.wait()?;
            return Ok(false);
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
    Ok(true)
}

/// The other side: what is written to standard output.
pub fn answer(path: &Path, pixels: u64) -> String {
    let limits = Limits {
        image_pixels: pixels,
        ..Limits::default()
    };
    let answer = match pictures::examine(path, &limits) {
        Ok(findings) => Answer::Found(findings),
        Err(error) => Answer::Refused {
            code: error.code().to_owned(),
            message: error.to_string(),
        },
    };
    // Words and numbers always have a JSON.
    serde_json::to_string(&answer).unwrap_or_default()
}
