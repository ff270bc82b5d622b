//! A small blocking client of the public API. It writes down each call as the curl command that does the same.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read};

use anyhow::{Context, Result, anyhow, bail};
use serde_json::Value;
use ureq::http;

/// Answers larger than this are refused: the demo's LoRA is a few megabytes.
const MAX_ANSWER_BYTES: u64 = 256 << 20;

/// One service, and the calls made to it so far.
pub struct Client {
    agent: ureq::Agent,
    base: String,
    script: String,
}

/// An answer with the headers that the demo looks at.
pub struct Answer {
    /// The JSON body.
    pub body: Value,
    /// The entity tag, if there was one.
    pub etag: Option<String>,
}

/// One server-sent event.
#[derive(Debug, Default)]
pub struct ServerEvent {
    /// What happened: `progress`, `state`, …
    pub kind: String,
    /// The JSON data.
    pub data: Value,
}

impl Client {
    /// A client of the service at `base`, for example `http://127.0.0.1:7870`.
    pub fn new(base: &str) -> Self {
        let agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .build()
            .new_agent();
        Self {
            agent,
            base: base.to_owned(),
            script: format!(
                "#!/bin/sh\n# What the demo did, as curl commands. Start the service first: lorasmith serve\nBASE={base}\n"
            ),
        }
    }

    /// The shell script of all calls so far.
    pub fn script(&self) -> &str {
        &self.script
    }

    fn note(&mut self, comment: &str, command: &str) {
        // Writing to a String cannot fail.
        let _ = write!(self.script, "\n# {comment}\n{command}\n");
    }

    /// `GET path` as JSON.
    pub fn get(&mut self, comment: &str, path: &str) -> Result<Answer> {
        self.note(comment, &format!("curl -sS \"$BASE{path}\""));
        let answer = self.agent.get(format!("{}{path}", self.base)).call()?;
        read_json(answer, "GET", path)
    }

    /// `POST path` with a JSON body.
    pub fn post(&mut self, comment: &str, path: &str, body: &Value) -> Result<Answer> {
        self.note(
            comment,
            &format!(
                "curl -sS \"$BASE{path}\" -H 'content-type: application/json' -d {}",
                shell_quote(&serde_json::to_string_pretty(body)?)
            ),
        );
        let answer = self
            .agent
            .post(format!("{}{path}", self.base))
            .send_json(body)?;
        read_json(answer, "POST", path)
    }

    /// `PATCH path` with a merge patch, only if the resource still carries `etag`.
    pub fn patch(&mut self, comment: &str, path: &str, etag: &str, patch: &Value) -> Result<Answer> {
        let text = serde_json::to_string(patch)?;
        self.note(
            comment,
            &format!(
                "curl -sS -X PATCH \"$BASE{path}\" -H 'content-type: application/merge-patch+json' -H {} -d {}",
                shell_quote(&format!("if-match: {etag}")),
                shell_quote(&text)
            ),
        );
        let answer = self
            .agent
            .patch(format!("{}{path}", self.base))
            .header("content-type", "application/merge-patch+json")
            .header("if-match", etag)
            .send(text)?;
        read_json(answer, "PATCH", path)
    }

    /// Uploads one file as `multipart/form-data`.
    pub fn upload(&mut self, comment: &str, path: &str, file_name: &str, content: &[u8]) -> Result<Answer> {
        self.note(
            comment,
            &format!("curl -sS \"$BASE{path}\" -F file=@{file_name}"),
        );
        // Random enough: the boundary only has to be absent from the content.
        let boundary = format!("lorasmith-{}", uuid::Uuid::new_v4().simple());
        let mut body = format!(
            "--{boundary}\r\ncontent-disposition: form-data; name=\"file\"; filename=\"{file_name}\"\r\ncontent-type: application/octet-stream\r\n\r\n"
        )
        .into_bytes();
        body.extend_from_slice(content);
        body.extend_from_slice(format!("\r\n--{boundary}--\r\n").as_bytes());
        let answer = self
            .agent
            .post(format!("{}{path}", self.base))
            .header(
                "content-type",
                format!("multipart/form-data; boundary={boundary}"),
            )
            .send(&body)?;
        read_json(answer, "POST", path)
    }

    /// Downloads a file; returns its bytes and its entity tag.
    pub fn download(&mut self, comment: &str, path: &str, file_name: &str) -> Result<(Vec<u8>, Option<String>)> {
        self.note(
            comment,
            &format!("curl -sS -o {file_name} \"$BASE{path}\""),
        );
        let mut answer = self.agent.get(format!("{}{path}", self.base)).call()?;
        if !answer.status().is_success() {
            bail!("GET {path}: {}", problem(&mut answer));
        }
        let etag = etag_of(&answer);
        let bytes = answer
            .body_mut()
            .with_config()
            .limit(MAX_ANSWER_BYTES)
            .read_to_vec()?;
        Ok((bytes, etag))
    }

    /// Follows server-sent events until the service ends the stream or `on_event` returns `false`.
    pub fn follow(
        &mut self,
        comment: &str,
        path: &str,
        mut on_event: impl FnMut(ServerEvent) -> Result<bool>,
    ) -> Result<()> {
        self.note(
            comment,
            &format!("curl -sSN \"$BASE{path}\" -H 'accept: text/event-stream'"),
        );
        let mut last_id: Option<String> = None;
        // A dropped connection is taken up where it ended, as browsers do.
        for _ in 0..20 {
            let mut request = self
                .agent
                .get(format!("{}{path}", self.base))
                .header("accept", "text/event-stream");
            if let Some(id) = &last_id {
                request = request.header("last-event-id", id);
            }
            let mut answer = request.call()?;
            if !answer.status().is_success() {
                bail!("GET {path}: {}", problem(&mut answer));
            }
            let lines = BufReader::new(answer.into_body().into_reader()).lines();
            if !read_events(lines, &mut last_id, &mut on_event)? {
                return Ok(());
            }
        }
        Err(anyhow!("GET {path}: the event stream broke off 20 times"))
    }
}

/// Reads one connection's events; `false` when the caller has seen enough.
fn read_events(
    lines: impl Iterator<Item = std::io::Result<String>>,
    last_id: &mut Option<String>,
    on_event: &mut impl FnMut(ServerEvent) -> Result<bool>,
) -> Result<bool> {
    let mut event = ServerEvent::default();
    let mut data = String::new();
    for line in lines {
        let Ok(line) = line else {
            return Ok(true); // broken off: connect again
        };
        if line.is_empty() {
            if !data.is_empty() {
                event.data = serde_json::from_str(&data).context("event data is not JSON")?;
                data.clear();
                if !on_event(std::mem::take(&mut event))? {
                    return Ok(false);
                }
            }
        } else if let Some(id) = line.strip_prefix("id:") {
            *last_id = Some(id.trim().to_owned());
        } else if let Some(kind) = line.strip_prefix("event:") {
            kind.trim().clone_into(&mut event.kind);
        } else if let Some(text) = line.strip_prefix("data:") {
            data.push_str(text.trim_start());
        }
    }
    Ok(true)
}

fn read_json(mut answer: http::Response<ureq::Body>, verb: &str, path: &str) -> Result<Answer> {
    if !answer.status().is_success() {
        bail!("{verb} {path}: {}", problem(&mut answer));
    }
    let etag = etag_of(&answer);
    let body = answer
        .body_mut()
        .read_json()
        .with_context(|| format!("{verb} {path}: the answer is not JSON"))?;
    Ok(Answer { body, etag })
}

fn etag_of(answer: &http::Response<ureq::Body>) -> Option<String> {
    let value = answer.headers().get("etag")?.to_str().ok()?;
    Some(value.to_owned())
}

fn problem(answer: &mut http::Response<ureq::Body>) -> String {
    let status = answer.status();
    let mut text = String::new();
    let _ = answer
        .body_mut()
        .as_reader()
        .take(1 << 16)
        .read_to_string(&mut text);
    format!("{status}: {text}")
}

fn shell_quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_carry_kind_data_and_id() {
        let text = ": hello\n\nid: 7\nevent: progress\ndata: {\"step\": 3}\n\nid: 8\nevent: state\ndata: {}\n\n";
        let mut last_id = None;
        let mut seen = Vec::new();
        let go_on = read_events(
            text.lines().map(|line| Ok(line.to_owned())),
            &mut last_id,
            &mut |event| {
                seen.push((event.kind, event.data));
                Ok(true)
            },
        )
        .unwrap();
        assert!(go_on);
        assert_eq!(last_id.as_deref(), Some("8"));
        assert_eq!(seen[0], ("progress".to_owned(), serde_json::json!({"step": 3})));
        assert_eq!(seen.len(), 2);
    }

    #[test]
    fn quotes_survive_the_shell() {
        assert_eq!(shell_quote("it's"), "'it'\\''s'");
    }
}
