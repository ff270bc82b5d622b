//! Uploads that come in parts: for large archives over lines that break. Parts are files, told by number and digest in
//! their names, so that they outlive the process; put together they are an upload like any other.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest as _, Sha256};
use tokio::task::spawn_blocking;
use uuid::Uuid;

use super::error::{DatasetError, InvalidField};
use super::ingest;
use super::prepare::{StagedFile, SubsetChoice};
use super::report::{FileReport, Summary};
use super::service::{DatasetService, missing};
use crate::store::uploads::{NewUpload, PartedUpload, UploadState};

/// Bytes of one part.
pub const MAX_PART_BYTES: u64 = 1 << 30;
/// Parts of one upload.
pub const MAX_PARTS: u32 = 10_000;
/// Uploads with parts on disk at the same time.
const MAX_OPEN: u64 = 256;
/// How long an upload to which nothing comes is kept, and an answer.
const IDLE: Duration = Duration::from_secs(3 * 24 * 60 * 60);

/// What a client says of an upload beforehand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Announcement {
    pub name: String,
    pub size_bytes: u64,
    pub sha256: Option<String>,
    pub choice: SubsetChoice,
}

/// A part that is on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    pub number: u32,
    pub size_bytes: u64,
    pub sha256: String,
}

/// An answer as the wire has it, made of reports.
pub type Render = fn(Vec<FileReport>, Summary) -> String;

impl DatasetService {
    /// Makes an upload whose parts may come.
    ///
    /// # Errors
    /// [`DatasetError::DatasetNotFound`], [`DatasetError::InvalidUpload`], [`DatasetError::InvalidSubset`],
    /// [`DatasetError::TooManyUploads`].
    pub async fn announce(
        &self,
        dataset_id: Uuid,
        announcement: Announcement,
    ) -> Result<PartedUpload, DatasetError> {
        self.exists(dataset_id).await?;
        ingest::check_choice(&announcement.choice)?;
        check(&announcement, self.limits().archive_bytes).map_err(DatasetError::InvalidUpload)?;
        if self.store().count_open_uploads().await? >= MAX_OPEN {
            return Err(DatasetError::TooManyUploads(MAX_OPEN));
        }
        let new = NewUpload {
            dataset_id,
            name: announcement.name,
            size_bytes: announcement.size_bytes,
            sha256: announcement
                .sha256
                .map(|digest| digest.to_ascii_lowercase()),
            choice: serde_json::to_string(&announcement.choice).unwrap_or_default(), // words and numbers
        };
        let made = self.store().create_upload(new).await;
        made.map_err(|error| missing(error, DatasetError::DatasetNotFound(dataset_id)))
    }

    /// An upload and the parts that are there.
    ///
    /// # Errors
    /// [`DatasetError::DatasetNotFound`], [`DatasetError::UploadNotFound`].
    pub async fn parted_upload(
        &self,
        dataset_id: Uuid,
        id: Uuid,
    ) -> Result<(PartedUpload, Vec<Part>), DatasetError> {
        self.exists(dataset_id).await?;
        let upload = self.store().upload(id).await;
        let upload = upload.map_err(|error| missing(error, DatasetError::UploadNotFound(id)))?;
        if upload.dataset_id != dataset_id {
            return Err(DatasetError::UploadNotFound(id));
        }
        let folder = self.store().upload_folder(id);
        let parts = spawn_blocking(move || parts(&folder)).await??;
        Ok((upload, parts.into_values().map(|(part, _)| part).collect()))
    }

    /// The uploads of a dataset, oldest first.
    ///
    /// # Errors
    /// [`DatasetError::DatasetNotFound`].
    pub async fn parted_uploads(
        &self,
        dataset_id: Uuid,
    ) -> Result<Vec<(PartedUpload, Vec<Part>)>, DatasetError> {
        self.exists(dataset_id).await?;
        let mut found = Vec::new();
        for upload in self.store().uploads(dataset_id).await? {
            let folder = self.store().upload_folder(upload.id);
            let parts = spawn_blocking(move || parts(&folder)).await??;
            found.push((upload, parts.into_values().map(|(part, _)| part).collect()));
        }
        Ok(found)
    }

    /// Takes over a part that was written to a file of the scratch folder. The same part again replaces the first one.
    ///
    /// # Errors
    /// [`DatasetError::UploadNotFound`], [`DatasetError::UploadNotOpen`].
    pub async fn keep_part(
        &self,
        upload: &PartedUpload,
        part: Part,
        written: PathBuf,
    ) -> Result<Part, DatasetError> {
        let open = UploadState::Open;
        if !self
            .store()
            .move_upload(upload.id, open, open, None)
            .await?
        {
            let now = self.store().upload(upload.id).await;
            now.map_err(|error| missing(error, DatasetError::UploadNotFound(upload.id)))?;
            return Err(DatasetError::UploadNotOpen);
        }
        let folder = self.store().upload_folder(upload.id);
        Ok(spawn_blocking(move || keep(&folder, part, &written)).await??)
    }

    /// Puts the parts together, takes them in, and keeps the answer: asked again, it is the same.
    ///
    /// The work goes on when the caller no longer waits.
    ///
    /// # Errors
    /// [`DatasetError::UploadNotFound`], [`DatasetError::UploadIncomplete`], [`DatasetError::ChecksumMismatch`],
    /// [`DatasetError::UploadNotOpen`] while it is being done, and those of an ingest.
    pub async fn complete_upload(
        &self,
        dataset_id: Uuid,
        id: Uuid,
        render: Render,
    ) -> Result<String, DatasetError> {
        let (upload, parts) = self.parted_upload(dataset_id, id).await?;
        if let (UploadState::Completed, Some(answer)) = (upload.state, upload.answer.clone()) {
            return Ok(answer);
        }
        is_whole(&upload, &parts)?;
        let (open, completing) = (UploadState::Open, UploadState::Completing);
        if !self.store().move_upload(id, open, completing, None).await? {
            return Err(DatasetError::UploadNotOpen);
        }
        let service = self.clone();
        let work = async move {
            let taken = service.take_in(upload, render).await;
            let store = service.store();
            let (state, answer) = match &taken {
                Ok(answer) => (UploadState::Completed, Some(answer.clone())),
                Err(_) => (open, None),
            };
            store.move_upload(id, completing, state, answer).await?;
            if taken.is_ok() {
                remove(&store.upload_folder(id)).await?;
            }
            taken
        };
        tokio::spawn(work).await?
    }

    async fn take_in(&self, upload: PartedUpload, render: Render) -> Result<String, DatasetError> {
        let scratch = self.scratch()?;
        let folder = self.store().upload_folder(upload.id);
        let path = scratch.path().join("upload-0");
        let (target, expected) = (path.clone(), upload.clone());
        spawn_blocking(move || assemble(&folder, &target, &expected)).await??;
        let file = StagedFile {
            name: upload.name,
            path,
        };
        let choice = serde_json::from_str(&upload.choice).unwrap_or_default(); // written by `announce`
        let (files, summary) = self
            .ingest(upload.dataset_id, vec![file], choice, scratch)
            .await?;
        Ok(render(files, summary))
    }

    /// Gives an upload up, or forgets its answer.
    ///
    /// # Errors
    /// [`DatasetError::UploadNotFound`], [`DatasetError::UploadNotOpen`] while it is being completed.
    pub async fn abandon_upload(&self, dataset_id: Uuid, id: Uuid) -> Result<(), DatasetError> {
        self.parted_upload(dataset_id, id).await?;
        if !self.store().delete_upload(id).await? {
            return Err(DatasetError::UploadNotOpen);
        }
        Ok(remove(&self.store().upload_folder(id)).await?)
    }

    /// Removes uploads that were given up without a word, and what is left of those of deleted datasets.
    ///
    /// # Errors
    /// When the database or the disk fails.
    pub async fn sweep_uploads(&self) -> Result<(), DatasetError> {
        let uploads = self.store().uploads_folder();
        // Read first: the folder of a later upload is not in it.
        let folders = spawn_blocking(move || folders(&uploads)).await??;
        let left = self.store().forget_uploads(IDLE).await?;
        for (id, folder) in folders {
            if !left.contains(&id) {
                remove(&folder).await?;
            }
        }
        Ok(())
    }
}

fn check(announcement: &Announcement, most: u64) -> Result<(), Vec<InvalidField>> {
    let mut wrong = Vec::new();
    let mut push = |field, code, message: String| {
        wrong.push(InvalidField {
            field,
            code,
            message,
        });
    };
    let length = announcement.name.chars().count();
    if length == 0 || length > 255 {
        let message = format!("found {length} characters, expected 1 to 255");
        push("name", "out_of_range", message);
    } else if announcement.name.chars().any(char::is_control) {
        push(
            "name",
            "invalid_value",
            "found control characters, expected none".to_owned(),
        );
    }
    if !(1..=most).contains(&announcement.size_bytes) {
        let message = format!("found {}, expected 1 to {most}", announcement.size_bytes);
        push("size_bytes", "out_of_range", message);
    }
    if let Some(sha256) = &announcement.sha256
        && (sha256.len() != 64 || !sha256.bytes().all(|byte| byte.is_ascii_hexdigit()))
    {
        push(
            "sha256",
            "invalid_value",
            "expected 64 hexadecimal digits".to_owned(),
        );
    }
    if wrong.is_empty() { Ok(()) } else { Err(wrong) }
}

/// Whether numbers and sizes are those of the whole.
fn is_whole(upload: &PartedUpload, parts: &[Part]) -> Result<(), DatasetError> {
    let missing = (1..)
        .zip(parts)
        .find(|(number, part)| *number != part.number);
    if let Some((number, _)) = missing {
        return Err(DatasetError::UploadIncomplete(format!(
            "part {number} is missing"
        )));
    }
    let found: u64 = parts.iter().map(|part| part.size_bytes).sum();
    if found != upload.size_bytes {
        let expected = upload.size_bytes;
        let message = format!(
            "found {found} bytes in {} parts, expected {expected}",
            parts.len()
        );
        return Err(DatasetError::UploadIncomplete(message));
    }
    Ok(())
}

/// The parts in a folder by their numbers; none when there is no folder.
fn parts(folder: &Path) -> io::Result<BTreeMap<u32, (Part, PathBuf)>> {
    let mut found = BTreeMap::new();
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        let Some((number, sha256)) = name.to_str().and_then(|name| name.split_once('-')) else {
            continue;
        };
        let (Ok(number), Ok(metadata)) = (number.parse(), entry.metadata()) else {
            continue; // replaced meanwhile
        };
        let part = Part {
            number,
            size_bytes: metadata.len(),
            sha256: sha256.to_owned(),
        };
        found.insert(number, (part, entry.path()));
    }
    Ok(found)
}

fn keep(folder: &Path, part: Part, written: &Path) -> io::Result<Part> {
    fs::create_dir_all(folder)?;
    let replaced = parts(folder)?.remove(&part.number);
    let path = folder.join(format!("{}-{}", part.number, part.sha256));
    File::options().write(true).open(written)?.sync_all()?;
    fs::rename(written, &path)?;
    if let Some((_, old)) = replaced
        && old != path
    {
        fs::remove_file(old)?;
    }
    if cfg!(unix) {
        File::open(folder)?.sync_all()?;
    }
    Ok(part)
}

/// Copies the parts one behind the other; they stay until all of it is taken in.
fn assemble(folder: &Path, target: &Path, upload: &PartedUpload) -> Result<(), DatasetError> {
    let parts = parts(folder)?;
    let in_order: Vec<Part> = parts.values().map(|(part, _)| part.clone()).collect();
    is_whole(upload, &in_order)?;
    let mut whole = File::create_new(target)?;
    let mut hasher = upload.sha256.is_some().then(Sha256::new);
    let mut buffer = vec![0; 1 << 20];
    for (_, path) in parts.values() {
        let mut part = File::open(path)?;
        loop {
            let read = part.read(&mut buffer)?;
            if read == 0 {
                break;
            }
            whole.write_all(&buffer[..read])?;
            if let Some(hasher) = &mut hasher {
                hasher.update(&buffer[..read]);
            }
        }
    }
    if let (Some(hasher), Some(expected)) = (hasher, &upload.sha256) {
        let found = hex::encode(hasher.finalize());
        if found != *expected {
            let expected = expected.clone();
            return Err(DatasetError::ChecksumMismatch { found, expected });
        }
    }
    Ok(())
}

/// Folders of uploads, by the ids that are their names.
fn folders(uploads: &Path) -> io::Result<Vec<(Uuid, PathBuf)>> {
    let entries = match fs::read_dir(uploads) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        if let Some(id) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        {
            found.push((id, entry.path()));
        }
    }
    Ok(found)
}

async fn remove(folder: &Path) -> io::Result<()> {
    match tokio::fs::remove_dir_all(folder).await {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}
