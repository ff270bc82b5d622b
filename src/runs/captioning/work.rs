//! The worker's part of a captioning job: pictures in the order of the job, captions in small transactions, and on from
//! where an earlier worker was.

use std::path::Path;
use std::time::{Duration, Instant};

use image::RgbImage;
use serde_json::json;
use tokio::runtime::Runtime;
use uuid::Uuid;

use super::CaptioningSpec;
use crate::captioning::blip::{Blip, BlipSettings};
use crate::captioning::taggers::{ScoredTag, Tagger, TaggerSettings};
use crate::captioning::{
    CaptionError, Captioner, CaptionerCatalog, Composed, Composer, Made, picture,
};
use crate::diffusion::devices;
use crate::runs::memory::SystemMemory;
use crate::runs::reporter::Reporter;
use crate::runs::worker::{self, Ending, WorkerParts};
use crate::store::datasets::Image;
use crate::store::runs::{CaptionOutcome, JobProgress, JobResult, Run, RunFailure};
use crate::store::{Store, StoreError};
use crate::training::{Control, Phase, ProgressSink as _, Report};

/// How long results are gathered before they are written: what a kill costs.
const GATHER: Duration = Duration::from_millis(500);
/// Pictures that BLIP gets at once.
const BLIP_BATCH: usize = 4;
/// The most pictures that taggers work on at the same time.
const MAX_THREADS: usize = 8;
/// Memory of a tagger besides what its files take many times over.
const TAGGER_BYTES: u64 = 6 << 30;

/// Captions what is left of the job.
pub fn work(
    runtime: &Runtime,
    parts: &WorkerParts,
    run: &Run,
    owner: &str,
    reporter: &mut Reporter,
) -> Result<(), Ending> {
    let unreadable = |error: serde_json::Error| RunFailure::new("spec_unreadable", error);
    let spec: CaptioningSpec = serde_json::from_str(&run.spec).map_err(unreadable)?;
    let images = runtime.block_on(parts.store.run_images(run.id));
    let images: Vec<Uuid> =
        serde_json::from_str(&images.map_err(worker::store_failed)?).map_err(unreadable)?;
    let done = runtime.block_on(parts.store.captioned_until(run.id));
    let done = done.map_err(worker::store_failed)?;
    let left = images.get(usize::try_from(done).unwrap_or(usize::MAX)..);
    let left = left.unwrap_or_default();
    reporter.expect_steps(images.len() as u64);
    reporter.captioned(done);
    let mut job = Job {
        runtime,
        store: &parts.store,
        run,
        owner,
        composer: Composer {
            mode: spec.mode,
            prefix: &spec.prefix,
            suffix: &spec.suffix,
            separator: &spec.tagger.separator,
        },
        dry_run: spec.dry_run,
        pending: Vec::new(),
        written_at: Instant::now(),
        began_at: Instant::now(),
        done_before: done,
        progress: JobProgress {
            done,
            total: images.len() as u64,
            ..JobProgress::default()
        },
    };
    if left.is_empty() {
        reporter.captioning(); // an earlier worker died between its last picture and its end
    } else {
        let model = open(runtime, parts, run, &spec, reporter)?;
        if reporter.captioning() == Control::Stop {
            return Err(Ending::Stopped);
        }
        job.began_at = Instant::now();
        job.caption_all(&model, left, reporter)?;
    }
    job.judge()?;
    match reporter.report(Report::Phase(Phase::Saving)) {
        Control::Continue => Ok(()),
        Control::Stop => Err(Ending::Stopped),
    }
}

/// A model that is ready.
enum Model {
    Tagger(Box<Tagger>, TaggerSettings),
    Blip(Box<Blip>, Box<BlipSettings>),
}

fn open(
    runtime: &Runtime,
    parts: &WorkerParts,
    run: &Run,
    spec: &CaptioningSpec,
    reporter: &mut Reporter,
) -> Result<Model, Ending> {
    let unusable = |error| RunFailure::new("device_unusable", error);
    let asked = spec.device.parse();
    let asked = asked.map_err(|error| RunFailure::new("device_unusable", error))?;
    let device = devices::open(asked).map_err(unusable)?;
    let noted = format!("{} ({})", device.info.id, device.info.name);
    runtime
        .block_on(parts.store.set_device(run.id, &noted))
        .map_err(worker::store_failed)?;
    let word = run.captioner.as_deref().unwrap_or_default();
    let Some(captioner) = Captioner::parse(word) else {
        let message = format!("this program has no captioner `{word}`");
        return Err(RunFailure::new("spec_unreadable", message).into());
    };
    if !parts.force_devices {
        worker::check_device(&parts.self_checks, &device, reporter)?;
    }
    if reporter.report(Report::Phase(Phase::Loading)) == Control::Stop {
        return Err(Ending::Stopped);
    }
    let found = CaptionerCatalog::new(parts.models.folder()).find(captioner, Some(&spec.model));
    let model = found.map_err(failure)?;
    Ok(match captioner.tagger() {
        Some(kind) => {
            limit_memory(&model.folder);
            let tagger = Tagger::load(&model.folder, kind).map_err(failure)?;
            Model::Tagger(Box::new(tagger), spec.tagger.clone())
        }
        None => {
            let blip = Blip::load(&model.folder, &device).map_err(failure)?;
            Model::Blip(Box::new(blip), Box::new((&spec.blip).into()))
        }
    })
}

/// A network from somewhere may ask for any amount of memory: this process then ends, and no other one.
fn limit_memory(folder: &Path) {
    #[cfg(target_os = "linux")]
    {
        use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        let files: u64 = entries
            .filter_map(|entry| entry.metadata().ok())
            .map(|metadata| metadata.len())
            .sum();
        let own = memory_stats::memory_stats().map_or(0, |stats| stats.virtual_mem as u64);
        let machine = SystemMemory::now().map_or(u64::MAX, |memory| memory.available_bytes);
        let more = files
            .saturating_mul(8)
            .saturating_add(TAGGER_BYTES)
            .min(machine);
        let before = getrlimit(Resource::As);
        let wanted = own.saturating_add(more);
        let limit = Rlimit {
            current: Some(before.current.map_or(wanted, |known| known.min(wanted))),
            ..before
        };
        if let Err(error) = setrlimit(Resource::As, limit) {
            tracing::warn!(%error, "the memory of this process is not limited");
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (folder, SystemMemory::now, TAGGER_BYTES);
}

/// A captioner that cannot be used.
fn failure(error: CaptionError) -> RunFailure {
    let code = match &error {
        CaptionError::Missing(_) => "captioner_model_missing",
        CaptionError::Setting { .. } => "invalid_settings",
        _ => "model_unusable",
    };
    RunFailure::new(code, error)
}

/// What is known of a picture before its caption is written.
struct Pending {
    result: JobResult,
    said: Result<Said, String>,
}

/// What is said of a picture.
enum Said {
    Made(Made),
    /// Nothing, for this reason.
    Keep(&'static str),
}

/// A picture, or what is said without looking at it; or why it cannot be opened.
type Opened = Result<Result<RgbImage, Said>, String>;

struct Job<'a> {
    runtime: &'a Runtime,
    store: &'a Store,
    run: &'a Run,
    owner: &'a str,
    composer: Composer<'a>,
    dry_run: bool,
    pending: Vec<Pending>,
    written_at: Instant,
    began_at: Instant,
    done_before: u64,
    progress: JobProgress,
}

impl Job<'_> {
    fn caption_all(
        &mut self,
        model: &Model,
        images: &[Uuid],
        reporter: &mut Reporter,
    ) -> Result<(), Ending> {
        let at_once = match model {
            Model::Tagger(..) => threads(),
            Model::Blip(..) => BLIP_BATCH,
        };
        for chunk in images.chunks(at_once) {
            let rows = self.rows(chunk)?;
            let known = self.caption_some(model, &rows, reporter);
            let stopped = known.is_none();
            for (image_id, (row, said)) in chunk
                .iter()
                .zip(rows.iter().zip(known.into_iter().flatten()))
            {
                let position = self.progress.done;
                self.progress.done += 1;
                let (said, tags) = match said {
                    Ok((said, tags)) => (Ok(said), tags),
                    Err(reason) => (Err(reason), None),
                };
                let result = JobResult {
                    position,
                    image_id: *image_id,
                    file_name: row
                        .as_ref()
                        .map(|row| row.file_name.clone())
                        .unwrap_or_default(),
                    tags,
                };
                self.pending.push(Pending { result, said });
            }
            let control = reporter.captioned(self.progress.done);
            if control == Control::Stop || stopped {
                self.write()?;
                return Err(Ending::Stopped);
            }
            if self.written_at.elapsed() >= GATHER {
                self.write()?;
            }
        }
        self.write()
    }

    /// The rows as they are now; `None` for an image that is gone.
    fn rows(&self, ids: &[Uuid]) -> Result<Vec<Option<Image>>, Ending> {
        let row = |id: &Uuid| match self.runtime.block_on(self.store.image(*id)) {
            Ok(image) => Ok(Some(image)),
            Err(StoreError::NotFound) => Ok(None),
            Err(error) => Err(worker::store_failed(error)),
        };
        ids.iter().map(row).collect()
    }

    /// What is said of some pictures, with their tags as JSON; `None` when the work is to stop.
    fn caption_some(
        &self,
        model: &Model,
        rows: &[Option<Image>],
        reporter: &mut Reporter,
    ) -> Option<Vec<Spoken>> {
        let one = |row: &Option<Image>| -> Opened {
            let Some(row) = row else {
                return Ok(Err(Said::Keep("it is no longer there")));
            };
            if self.composer.keeps(row.caption.as_deref()) {
                return Ok(Err(Said::Keep("it has a caption")));
            }
            let decoded = picture::decode(&self.store.blobs().path(&row.sha256));
            decoded.map(Ok).map_err(|error| error.to_string())
        };
        match model {
            Model::Tagger(tagger, settings) => Some(tag_each(tagger, settings, rows, one)),
            Model::Blip(blip, settings) => describe_each(blip, settings, rows, one, reporter),
        }
    }

    /// Writes what is gathered.
    fn write(&mut self) -> Result<(), Ending> {
        self.written_at = Instant::now();
        if self.pending.is_empty() {
            return Ok(());
        }
        let seconds = self.began_at.elapsed().as_secs_f64().max(1e-3);
        let speed = (self.progress.done - self.done_before) as f64 / seconds;
        let left = self.progress.total.saturating_sub(self.progress.done);
        self.progress.images_per_s = Some(speed);
        self.progress.eta_s = (speed > 0.0).then(|| left as f64 / speed);
        let (results, said): (Vec<JobResult>, Vec<_>) = std::mem::take(&mut self.pending)
            .into_iter()
            .map(|pending| (pending.result, pending.said))
            .unzip();
        let composer = &self.composer;
        let decide = |index: usize, present: Option<Option<&str>>| {
            let skipped = |reason: &str| (CaptionOutcome::Skipped, Some(reason.to_owned()), None);
            let Some(present) = present else {
                return skipped("it is no longer there");
            };
            match &said[index] {
                Ok(Said::Keep(reason)) => skipped(reason),
                Ok(Said::Made(made)) => match composer.compose(present, made) {
                    Composed::Write(caption) => (CaptionOutcome::Captioned, None, Some(caption)),
                    Composed::Keep(reason) => skipped(reason),
                    Composed::Fail(reason) => (CaptionOutcome::Failed, Some(reason), None),
                },
                Err(reason) => (CaptionOutcome::Failed, Some(reason.clone()), None),
            }
        };
        let written = self.store.record_captions(
            self.run,
            self.owner,
            self.dry_run,
            results,
            self.progress,
            decide,
        );
        match self.runtime.block_on(written) {
            Ok(true) => Ok(()),
            Ok(false) => Err(Ending::Stopped), // another worker has the job
            Err(error) => Err(worker::store_failed(error)),
        }
    }

    /// A job all of whose images have failed has not succeeded.
    fn judge(&self) -> Result<(), Ending> {
        let id = self.run.id;
        let counts = self.runtime.block_on(self.store.caption_counts(&[id]));
        let counts = counts.map_err(worker::store_failed)?;
        let counts = counts.get(&id).copied().unwrap_or_default();
        if counts.failed == 0 || counts.captioned + counts.skipped > 0 {
            return Ok(());
        }
        let first = self.store.caption_results(id, None, None, 1);
        let first = self.runtime.block_on(first).map_err(worker::store_failed)?;
        let reason = first.into_iter().next().and_then(|result| result.message);
        let message = format!(
            "none of {} images could be captioned; of the first: {}",
            counts.failed,
            reason.unwrap_or_default()
        );
        Err(RunFailure::new("captioning_failed", message).into())
    }
}

fn threads() -> usize {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    cores.min(MAX_THREADS)
}

/// What is said of a picture, with its tags as JSON.
type Spoken = Result<(Said, Option<String>), String>;

/// One thread for each picture: the network is shared, what it computes is not.
fn tag_each(
    tagger: &Tagger,
    settings: &TaggerSettings,
    rows: &[Option<Image>],
    one: impl Fn(&Option<Image>) -> Opened + Sync,
) -> Vec<Spoken> {
    let tag = |row: &Option<Image>| match one(row)? {
        Err(kept) => Ok((kept, None)),
        Ok(picture) => {
            let tags = tagger.tag(&picture).map_err(|error| error.to_string())?;
            let made = Made::Tags(settings.choose(&tags));
            Ok((Said::Made(made), Some(json_of(&tags))))
        }
    };
    std::thread::scope(|scope| {
        let tag = &tag;
        let spawn = |row| scope.spawn(move || tag(row));
        let running: Vec<_> = rows.iter().map(spawn).collect();
        let panicked = || Err("the picture's decoder has panicked".to_owned());
        let ended = running.into_iter().map(std::thread::ScopedJoinHandle::join);
        ended
            .map(|end| end.unwrap_or_else(|_| panicked()))
            .collect()
    })
}

/// Pictures that can be opened are described together; `None` when the work is to stop.
fn describe_each(
    blip: &Blip,
    settings: &BlipSettings,
    rows: &[Option<Image>],
    one: impl Fn(&Option<Image>) -> Opened,
    reporter: &mut Reporter,
) -> Option<Vec<Spoken>> {
    let mut pictures = Vec::new();
    let mut spoken: Vec<Option<Spoken>> = rows
        .iter()
        .map(|row| match one(row) {
            Ok(Ok(picture)) => {
                pictures.push(picture);
                None
            }
            Ok(Err(kept)) => Some(Ok((kept, None))),
            Err(reason) => Some(Err(reason)),
        })
        .collect();
    let mut go_on = || reporter.go_on() == Control::Continue;
    let mut captions = match blip.caption(&pictures, settings, &mut go_on) {
        Ok(captions) => captions.into_iter().map(Ok).collect::<Vec<_>>(),
        Err(CaptionError::Cancelled) => return None,
        Err(error) => vec![Err(error.to_string()); pictures.len()],
    }
    .into_iter();
    for place in spoken.iter_mut().filter(|place| place.is_none()) {
        let caption = captions
            .next()
            .unwrap_or_else(|| Err("the model has said nothing".to_owned()));
        *place = Some(caption.map(|text| (Said::Made(Made::Text(text)), None)));
    }
    Some(spoken.into_iter().flatten().collect())
}

/// As the results keep them, the most probable first.
fn json_of(tags: &[ScoredTag]) -> String {
    let mut tags: Vec<&ScoredTag> = tags.iter().collect();
    tags.sort_by(|a, b| b.confidence.total_cmp(&a.confidence));
    let rows = tags.into_iter().map(|tag| {
        json!({"name": tag.name, "category": tag.category.as_str(), "confidence": tag.confidence})
    });
    serde_json::Value::from_iter(rows).to_string()
}
