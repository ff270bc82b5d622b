//! A service on a free port with an empty data folder, and a blocking client of it.

use std::io::{Cursor, Write as _};
use std::net::Ipv4Addr;
use std::path::Path;

use lorasmith::app;
use lorasmith::config::Config;
use serde_json::{Value, json};
use tempfile::TempDir;
use ureq::http::{HeaderMap, Request, Response};

use crate::database::TestDatabase;

/// The usual settings of a service in a folder.
pub fn config_in(folder: &Path) -> Config {
    Config {
        bind: (Ipv4Addr::LOCALHOST, 0).into(),
        data_dir: folder.join("data"),
        models_dir: folder.join("models"),
        http_workers: 1,
        ..Config::default()
    }
}

/// A running service; it stops when this is dropped.
pub struct Service {
    base: String,
    agent: ureq::Agent,
    running: Option<app::Service>,
    folder: TempDir,
    database: Option<TestDatabase>,
}

/// An answer, read to its end.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: HeaderMap,
    pub bytes: Vec<u8>,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.bytes)
            .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&self.bytes)))
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .map_or("", |value| value.to_str().expect("ASCII"))
    }

    /// The JSON of an answer that has to have this status.
    pub fn expect(&self, status: u16) -> Value {
        assert_eq!(
            self.status,
            status,
            "{}",
            String::from_utf8_lossy(&self.bytes)
        );
        if self.bytes.is_empty() {
            Value::Null
        } else {
            self.json()
        }
    }

    /// The problem of an answer that has to have this status and code.
    pub fn problem(&self, status: u16, code: &str) -> Value {
        let problem = self.expect(status);
        assert_eq!(self.header("content-type"), "application/problem+json");
        assert_eq!(
            (&problem["code"], &problem["status"]),
            (&json!(code), &json!(status)),
            "{problem}"
        );
        assert!(!self.header("x-request-id").is_empty());
        problem
    }
}

impl Service {
    pub fn start() -> Self {
        Self::start_with(|_| {})
    }

    /// With other settings than the usual ones.
    pub fn start_with(change: impl FnOnce(&mut Config)) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let database = TestDatabase::new(folder.path());
        Self::start_in(folder, database, change)
    }

    /// Ends it and starts another one on its folder.
    pub fn restart_with(mut self, change: impl FnOnce(&mut Config)) -> Self {
        let running = self.running.take().expect("a running service");
        running.stop().expect("an end");
        let folder = std::mem::replace(&mut self.folder, tempfile::tempdir().expect("a folder"));
        let database = self.database.take().expect("a database");
        Self::start_in(folder, database, change)
    }

    fn start_in(folder: TempDir, database: TestDatabase, change: impl FnOnce(&mut Config)) -> Self {
        let mut config = config_in(folder.path());
        config.database_url = Some(database.url().to_owned());
        change(&mut config);
        let running = app::Service::start_in_background(config).expect("a service that starts");
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .max_idle_connections(0) // the service would wait for them at its end
            .build();
        Self {
            base: format!("http://{}", running.address()),
            agent: config.new_agent(),
            running: Some(running),
            folder,
            database: Some(database),
        }
    }

    /// Any request; without a body when `body` is empty.
    pub fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.base));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let answer = match body {
            [] => self.agent.run(request.body(()).expect("a request")),
            body => self.agent.run(request.body(body).expect("a request")),
        };
        read(answer.expect("an answer"))
    }

    /// Sends bytes as they are, ends its side of the line, and returns what comes back.
    pub fn raw(&self, bytes: &[u8]) -> String {
        let address = self.base.trim_start_matches("http://");
        let mut line = std::net::TcpStream::connect(address).expect("a line");
        line.write_all(bytes).expect("sent");
        line.shutdown(std::net::Shutdown::Write).expect("shut");
        let mut answer = Vec::new();
        let _ = std::io::Read::read_to_end(&mut line, &mut answer); // it may be cut
        String::from_utf8_lossy(&answer).into_owned()
    }

    /// Where the service keeps everything.
    pub fn data_dir(&self) -> std::path::PathBuf {
        self.folder.path().join("data")
    }

    pub fn get(&self, path: &str) -> Answer {
        self.send("GET", path, &[], &[])
    }

    pub fn delete(&self, path: &str) -> Answer {
        self.send("DELETE", path, &[], &[])
    }

    pub fn delete_if_match(&self, path: &str, tag: &str) -> Answer {
        self.send("DELETE", path, &[("if-match", tag)], &[])
    }

    pub fn post(&self, path: &str, body: &Value) -> Answer {
        self.post_with(path, &[], body)
    }

    pub fn post_with(&self, path: &str, headers: &[(&str, &str)], body: &Value) -> Answer {
        let headers = [&[("content-type", "application/json")], headers].concat();
        self.send("POST", path, &headers, body.to_string().as_bytes())
    }

    pub fn patch(&self, path: &str, if_match: Option<&str>, patch: &Value) -> Answer {
        let mut headers = vec![("content-type", "application/merge-patch+json")];
        headers.extend(if_match.map(|tag| ("if-match", tag)));
        self.send("PATCH", path, &headers, patch.to_string().as_bytes())
    }

    /// Sends a form; fields without, files with a file name.
    pub fn upload(&self, path: &str, fields: &[(&str, &str)], files: &[(&str, &[u8])]) -> Answer {
        let mut body = Vec::new();
        for (name, text) in fields {
            write!(
                body,
                "--XYZ\r\ncontent-disposition: form-data; name=\"{name}\"\r\n\r\n{text}\r\n"
            )
            .expect("memory");
        }
        for (name, content) in files {
            write!(body, "--XYZ\r\ncontent-disposition: form-data; name=\"file\"; filename=\"{name}\"\r\n\r\n")
                .expect("memory");
            body.extend_from_slice(content);
            body.extend_from_slice(b"\r\n");
        }
        body.extend_from_slice(b"--XYZ--\r\n");
        self.send(
            "POST",
            path,
            &[("content-type", "multipart/form-data; boundary=XYZ")],
            &body,
        )
    }

    /// Makes a dataset and returns its path.
    pub fn dataset(&self, name: &str) -> String {
        let made = self
            .post("/v1/datasets", &json!({"name": name}))
            .expect(201);
        format!("/v1/datasets/{}", made["id"].as_str().expect("an id"))
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if let Some(running) = self.running.take()
            && let Err(error) = running.stop()
            && !std::thread::panicking()
        {
            panic!("{error:#}");
        }
    }
}

fn read(mut answer: Response<ureq::Body>) -> Answer {
    Answer {
        status: answer.status().as_u16(),
        headers: answer.headers().clone(),
        bytes: answer.body_mut().read_to_vec().expect("a body"),
    }
}

/// A PNG of one colour; another shade is another content.
pub fn png(shade: u8) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    image::RgbImage::from_pixel(16, 12, image::Rgb([shade, 0, 0]))
        .write_to(&mut bytes, image::ImageFormat::Png)
        .expect("an encoder");
    bytes.into_inner()
}

pub fn zip(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut writer = zip::ZipWriter::new(Cursor::new(Vec::new()));
    for (name, content) in entries {
        let options = zip::write::SimpleFileOptions::default();
        writer.start_file(*name, options).expect("started");
        writer.write_all(content).expect("written");
    }
    writer.finish().expect("finished").into_inner()
}
