//! Results of self-checks on disk: one file per adapter, driver and version of this program.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{CHECKS, SelfCheck, run};
use crate::diffusion::devices::{ComputeDevice, DeviceInfo};

/// The folder of remembered results. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct Remembered {
    folder: PathBuf,
}

/// What a result is about. Metal and DX12 name no driver: there it is remembered until the version changes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Subject {
    lorasmith: String,
    /// Names and tolerances: a build with other checks runs them.
    checks: Vec<(String, f64)>,
    api: String,
    /// As the build has it: another compiler makes other kernels.
    compiler: String,
    adapter: String,
    driver: String,
    supports_f16: bool,
}

impl Subject {
    /// An adapter's number is no part of it: it changes when another card is plugged in.
    fn of(info: &DeviceInfo) -> Self {
        let api = info.id.split(':').next().unwrap_or_default();
        Self {
            lorasmith: env!("CARGO_PKG_VERSION").to_owned(),
            checks: CHECKS
                .iter()
                .map(|check| (check.name.to_owned(), check.tolerance))
                .collect(),
            api: api.to_owned(),
            compiler: info.compiler.to_owned(),
            adapter: info.name.clone(),
            driver: info.driver.clone(),
            supports_f16: info.supports_f16,
        }
    }
}

/// A file's content.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    subject: Subject,
    result: SelfCheck,
}

impl Remembered {
    /// Results are kept in `devices` below the data folder.
    pub fn new(data_dir: &Path) -> Self {
        Self {
            folder: data_dir.join("devices"),
        }
    }

    /// The result for this adapter, driver and version; a file that is damaged or about something else counts as none.
    pub fn find(&self, info: &DeviceInfo) -> Option<SelfCheck> {
        let subject = Subject::of(info);
        let path = self.path(&subject);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "a remembered self-check is ignored");
                return None;
            }
        };
        match serde_json::from_slice::<Record>(&bytes) {
            Ok(record) if record.subject == subject => Some(record.result),
            Ok(_) => {
                let error = "it is about another device";
                tracing::warn!(path = %path.display(), error, "a remembered self-check is ignored");
                None
            }
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "a remembered self-check is ignored");
                None
            }
        }
    }

    /// Checks the device now and remembers the result; no answer when `go_on` says no.
    ///
    /// A folder that cannot be written to costs another check the next time, and no more.
    pub fn run(
        &self,
        device: &ComputeDevice,
        go_on: impl FnMut(usize, usize) -> bool,
    ) -> Option<SelfCheck> {
        let result = run(device, go_on)?;
        if let Err(error) = self.keep(&device.info, &result) {
            let folder = self.folder.display();
            tracing::warn!(%folder, %error, "the self-check cannot be remembered");
        }
        Some(result)
    }

    /// Writes the file: under a temporary name, flushed to disk, renamed.
    fn keep(&self, info: &DeviceInfo, result: &SelfCheck) -> io::Result<()> {
        let subject = Subject::of(info);
        let path = self.path(&subject);
        let record = Record {
            subject,
            result: result.clone(),
        };
        fs::create_dir_all(&self.folder)?;
        let mut file = tempfile::NamedTempFile::new_in(&self.folder)?;
        file.write_all(&serde_json::to_vec_pretty(&record)?)?;
        file.as_file().sync_all()?;
        file.persist(&path).map_err(|error| error.error)?;
        if cfg!(unix) {
            fs::File::open(&self.folder)?.sync_all()?; // makes the rename durable
        }
        Ok(())
    }

    fn path(&self, subject: &Subject) -> PathBuf {
        let mut digest = Sha256::new();
        // A subject is strings, numbers and lists of them, all of which have a JSON.
        digest.update(serde_json::to_vec(subject).unwrap_or_default());
        self.folder
            .join(format!("{}.json", hex::encode(digest.finalize())))
    }
}

#[cfg(test)]
mod tests {
    use time::OffsetDateTime;

    use super::super::CheckResult;
    use super::*;
    use crate::diffusion::devices::AdapterClass;

    fn info() -> DeviceInfo {
        DeviceInfo {
            id: "vulkan:0".to_owned(),
            name: "A card".to_owned(),
            class: AdapterClass::Discrete,
            driver: "driver 1.2".to_owned(),
            compiler: "wgsl",
            supports_f16: true,
            max_buffer_bytes: None,
            memory_bytes: None,
            is_default: true,
        }
    }

    fn result() -> SelfCheck {
        let check = |name: &str, error: Option<f64>| CheckResult {
            name: name.to_owned(),
            error,
            tolerance: 1e-4,
            passed: error.is_some(),
            detail: "output".to_owned(),
        };
        SelfCheck {
            checked_at: OffsetDateTime::UNIX_EPOCH,
            duration_s: 1.5,
            checks: vec![check("linear", Some(1.25e-7)), check("attention", None)],
        }
    }

    /// The only file that there is.
    fn only_file(folder: &Path) -> PathBuf {
        let files: Vec<_> = fs::read_dir(folder.join("devices")).unwrap().collect();
        assert_eq!(files.len(), 1);
        files[0].as_ref().unwrap().path()
    }

    #[test]
    fn a_result_is_found_again() {
        let folder = tempfile::tempdir().unwrap();
        let remembered = Remembered::new(folder.path());
        assert_eq!(remembered.find(&info()), None);
        remembered.keep(&info(), &result()).unwrap();
        remembered.keep(&info(), &result()).unwrap();
        assert_eq!(remembered.find(&info()), Some(result()));
        only_file(folder.path());

        let elsewhere = DeviceInfo {
            id: "vulkan:1".to_owned(),
            is_default: false,
            ..info()
        };
        assert_eq!(remembered.find(&elsewhere), Some(result()));
    }

    #[test]
    fn another_adapter_driver_or_api_is_not_known() {
        let folder = tempfile::tempdir().unwrap();
        let remembered = Remembered::new(folder.path());
        remembered.keep(&info(), &result()).unwrap();
        let changes: [fn(&mut DeviceInfo); 3] = [
            |info| info.name = "Another card".to_owned(),
            |info| info.driver = "driver 1.3".to_owned(),
            |info| info.id = "dx12:0".to_owned(),
        ];
        for change in changes {
            let mut other = info();
            change(&mut other);
            assert_eq!(remembered.find(&other), None, "{other:?}");
        }
    }

    #[test]
    fn a_damaged_or_foreign_file_is_ignored() {
        let folder = tempfile::tempdir().unwrap();
        let remembered = Remembered::new(folder.path());
        remembered.keep(&info(), &result()).unwrap();
        let file = only_file(folder.path());
        let whole = fs::read_to_string(&file).unwrap();
        let foreign = whole.replace("driver 1.2", "driver 9");
        for content in [&whole[..whole.len() / 2], "", "{}", foreign.as_str()] {
            fs::write(&file, content).unwrap();
            assert_eq!(remembered.find(&info()), None, "{content}");
        }
        remembered.keep(&info(), &result()).unwrap();
        assert_eq!(remembered.find(&info()), Some(result()));
    }
}
