//! Previews, thumbnails, measures and reports of datasets that are there.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::{StreamExt as _, stream};
use image::{GrayImage, Rgb, RgbImage};
use tokio::sync::{Notify, Semaphore};
use tokio::task::spawn_blocking;
use uuid::Uuid;

use super::color_correction;
use super::error::PreparationError;
use super::measures::{FORMAT, Measured};
use super::preview::Seen;
use super::report::{self, Report, ReportInput, ReportSettings};
use super::thumbnails::{self, Thumbnail, Thumbnails, fit_within};
use crate::dataloader::{
    BucketSettings, ColorCorrection, CropMode, Look, Window, decode, frame, load_mask, resize,
    set_median,
};
use crate::store::datasets::{Correction, Dataset, Image, ImageFilter, Subset};
use crate::store::{Store, StoreError};

/// Pictures that are decoded at the same time; one can take half a gigabyte.
const AT_ONCE: usize = 2;
/// How long a request measures pictures itself before it answers with what there is.
const PATIENCE: Duration = Duration::from_secs(3);
/// Pictures that are measured between two looks at the database.
const BACKGROUND_PICTURES: u64 = 32;
/// How long the background waits for something to do that nobody has told it of.
const BACKGROUND_PAUSE: Duration = Duration::from_secs(60);
/// Medians of datasets that are remembered.
const MEDIANS: usize = 256;

/// Previews and reports. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct PreparationService {
    store: Store,
    thumbnails: Thumbnails,
    gate: Arc<Semaphore>,
    wake: Arc<Notify>,
    medians: Arc<Mutex<Medians>>,
}

/// By dataset: its revision, and the median of its colours then.
type Medians = HashMap<Uuid, (i64, [u8; 3])>;

/// What a preview picture shows.
#[derive(Clone, Debug, PartialEq)]
pub struct Rendering {
    /// Sizes, and where the picture is cut.
    pub settings: BucketSettings,
    /// Another colour correction than the one that is stored.
    pub correction: Option<Correction>,
    /// Whether what does not count in the loss is darkened.
    pub masked: bool,
    /// The longest side of the answer.
    pub side_px: u32,
}

/// A picture that can be made, under the name of all that decides it.
#[derive(Clone, Debug)]
pub struct Planned {
    /// Its name.
    pub name: String,
    sha256: String,
    side_px: u32,
    framing: Option<Framing>,
}

/// How a picture is resized, cut and changed.
#[derive(Clone, Debug)]
struct Framing {
    settings: BucketSettings,
    look: Look,
    mask: Option<MaskOf>,
}

/// Where the mask of a picture is.
#[derive(Clone, Debug)]
enum MaskOf {
    /// In a file of its own, with this digest.
    File(String),
    /// In its transparency.
    Alpha,
}

impl PreparationService {
    /// `wake` is what an upload notifies.
    pub fn new(store: Store, wake: Arc<Notify>) -> Self {
        Self {
            thumbnails: Thumbnails::new(store.data_dir()),
            store,
            gate: Arc::new(Semaphore::new(AT_ONCE)),
            wake,
            medians: Arc::default(),
        }
    }

    /// What a run with these settings would see of images after `after`, oldest first.
    ///
    /// # Errors
    /// [`PreparationError::DatasetNotFound`], [`PreparationError::Settings`].
    pub async fn preview(
        &self,
        dataset_id: Uuid,
        settings: &BucketSettings,
        correction: Option<Correction>,
        after: Option<Uuid>,
        limit: u64,
    ) -> Result<Vec<Seen>, PreparationError> {
        check(settings)?;
        let dataset = self.dataset(dataset_id).await?;
        let images = self
            .store
            .list_images(dataset_id, &ImageFilter::default(), after, limit)
            .await?;
        let measured = match settings.crop {
            CropMode::Smart => self.measured(dataset_id, &images).await?,
            CropMode::Centre | CropMode::Random => HashMap::new(),
        };
        let see = |image: &Image| {
            let mut image = image.clone();
            image.color_correction = correction.or(image.color_correction);
            let known = measured.get(&image.sha256);
            Seen::new(&image, dataset.color_correction, settings, known)
        };
        Ok(images.iter().map(see).collect())
    }

    /// A small copy of an image as it is.
    ///
    /// # Errors
    /// [`PreparationError::DatasetNotFound`], [`PreparationError::ImageNotFound`].
    pub async fn plan_thumbnail(
        &self,
        dataset_id: Uuid,
        image_id: Uuid,
        side_px: u32,
    ) -> Result<Planned, PreparationError> {
        self.dataset(dataset_id).await?;
        let image = self.image(dataset_id, image_id).await?;
        Ok(thumbnail(&image, side_px))
    }

    /// What a run would see of an image, made smaller.
    ///
    /// # Errors
    /// [`PreparationError::DatasetNotFound`], [`PreparationError::ImageNotFound`], [`PreparationError::Settings`].
    pub async fn plan_preview(
        &self,
        dataset_id: Uuid,
        image_id: Uuid,
        rendering: &Rendering,
    ) -> Result<Planned, PreparationError> {
        check(&rendering.settings)?;
        let dataset = self.dataset(dataset_id).await?;
        let image = self.image(dataset_id, image_id).await?;
        let said = rendering.correction.or(image.color_correction);
        let correction = color_correction(said.or(dataset.color_correction));
        let target = match correction {
            Some(ColorCorrection::MatchMedian) => self.median(&dataset).await?,
            _ => [0; 3],
        };
        let settings = &rendering.settings;
        let look = Look {
            window: match settings.crop {
                CropMode::Smart => Window::Smart,
                CropMode::Centre | CropMode::Random => Window::Centre,
            },
            // Checked when the picture was uploaded.
            background: image
                .background
                .as_deref()
                .and_then(|colour| colour.parse().ok()),
            correction: correction.map(|recipe| (recipe, target)),
            ..Look::default()
        };
        let placement = settings.place(image.width_px.max(1), image.height_px.max(1));
        let mask = image.mask_sha256.map_or(MaskOf::Alpha, MaskOf::File);
        let mask = rendering.masked.then_some(mask);
        Ok(Planned {
            name: thumbnails::name(&[
                "preview",
                &image.sha256,
                &format!("{placement:?} {look:?} {mask:?}"),
                &rendering.side_px.to_string(),
            ]),
            sha256: image.sha256,
            side_px: rendering.side_px,
            framing: Some(Framing {
                settings: settings.clone(),
                look,
                mask,
            }),
        })
    }

    /// Makes a picture that was planned, or finds it.
    ///
    /// # Errors
    /// [`PreparationError::Picture`] when the file cannot be decoded any more.
    pub async fn render(&self, planned: Planned) -> Result<Thumbnail, PreparationError> {
        let (thumbnails, blobs) = (self.thumbnails.clone(), self.store.blobs().clone());
        let known = {
            let (thumbnails, name) = (thumbnails.clone(), planned.name.clone());
            spawn_blocking(move || thumbnails.get(&name)).await?
        };
        if let Some(known) = known {
            return Ok(known);
        }
        // The gate is never closed.
        let _place = self.gate.acquire().await.ok();
        let render = move || {
            let made = planned.make(|sha256| blobs.path(sha256))?;
            thumbnails.put(&planned.name, &made);
            Ok(made)
        };
        spawn_blocking(render).await?
    }

    /// What is known of these images, after measuring for a moment what is not.
    async fn measured(
        &self,
        dataset_id: Uuid,
        images: &[Image],
    ) -> Result<HashMap<String, Measured>, PreparationError> {
        let rows = self.store.picture_measures(dataset_id, FORMAT).await?;
        let mut measured: HashMap<String, Measured> = spawn_blocking(move || {
            let parse = |(sha256, json): (String, String)| {
                Some((sha256, serde_json::from_str(&json).ok()?))
            };
            rows.into_iter().filter_map(parse).collect()
        })
        .await?;
        let missing: HashSet<&str> = images
            .iter()
            .map(|image| image.sha256.as_str())
            .filter(|sha256| !measured.contains_key(*sha256))
            .collect();
        if missing.is_empty() {
            return Ok(measured);
        }
        let missing = missing.into_iter().map(str::to_owned).collect();
        let new = self.measure(missing).await?;
        measured.extend(new);
        Ok(measured)
    }

    /// Measures pictures for a while, and keeps what was found.
    async fn measure(
        &self,
        missing: Vec<String>,
    ) -> Result<Vec<(String, Measured)>, PreparationError> {
        let until = Instant::now() + PATIENCE;
        let found: Vec<_> = stream::iter(missing)
            .map(|sha256| self.measure_one(sha256, Some(until)))
            .buffer_unordered(AT_ONCE)
            .collect()
            .await;
        let found: Vec<Option<_>> = found.into_iter().collect::<Result<_, _>>()?;
        let found: Vec<(String, Measured)> = found.into_iter().flatten().collect();
        self.keep(&found).await?;
        Ok(found)
    }

    /// Measures one picture in its turn, unless that comes too late.
    async fn measure_one(
        &self,
        sha256: String,
        until: Option<Instant>,
    ) -> Result<Option<(String, Measured)>, PreparationError> {
        let _place = self.gate.acquire().await.ok();
        if until.is_some_and(|until| Instant::now() >= until) {
            return Ok(None);
        }
        let path = self.store.blobs().path(&sha256);
        let measured = spawn_blocking(move || Measured::of(&path)).await?;
        Ok(Some((sha256, measured)))
    }

    async fn keep(&self, found: &[(String, Measured)]) -> Result<(), PreparationError> {
        let rows = found.iter().filter_map(|(sha256, measured)| {
            let json = serde_json::to_string(measured).ok()?;
            Some((sha256.clone(), json))
        });
        let rows: Vec<_> = rows.collect();
        Ok(self.store.keep_picture_measures(FORMAT, rows).await?)
    }

    /// The median of a set's colours, as a run works it out; of the images that were measured, as long as not all are.
    async fn median(&self, dataset: &Dataset) -> Result<[u8; 3], PreparationError> {
        let known = |medians: &Medians| {
            let found = medians.get(&dataset.id);
            found
                .filter(|(revision, _)| *revision == dataset.revision)
                .copied()
        };
        let medians = || self.medians.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, median)) = known(&medians()) {
            return Ok(median);
        }
        let images = self.store.all_images(dataset.id).await?;
        let images: Vec<Image> = images
            .into_iter()
            .filter(|(_, subset)| !subset.is_reg)
            .map(|(image, _)| image)
            .collect();
        let measured = self.measured(dataset.id, &images).await?;
        let found: Vec<[u8; 3]> = images
            .iter()
            .filter_map(|image| Some(measured.get(&image.sha256)?.whole()?.medians))
            .collect();
        let median = set_median(&found);
        if images
            .iter()
            .all(|image| measured.contains_key(&image.sha256))
        {
            let mut medians = medians();
            if medians.len() >= MEDIANS {
                medians.clear();
            }
            medians.insert(dataset.id, (dataset.revision, median));
        }
        Ok(median)
    }

    /// The report on a dataset for a run with these settings. Pictures that nobody has measured are measured for a few
    /// seconds; what is left is measured in the background, and the report says that it is not complete.
    ///
    /// # Errors
    /// [`PreparationError::DatasetNotFound`], [`PreparationError::Settings`].
    pub async fn report(
        &self,
        dataset_id: Uuid,
        settings: ReportSettings,
    ) -> Result<Report, PreparationError> {
        check(&settings.buckets)?;
        let dataset = self.dataset(dataset_id).await?;
        let rows: Vec<(Image, Subset)> = self.store.all_images(dataset_id).await?;
        let images: Vec<Image> = rows.iter().map(|(image, _)| image.clone()).collect();
        let measured = self.measured(dataset_id, &images).await?;
        let input = ReportInput {
            dataset,
            rows,
            measured,
            settings,
        };
        let report = spawn_blocking(move || report::build(&input)).await?;
        if !report.complete {
            self.wake.notify_one();
        }
        Ok(report)
    }

    /// The report as a page that needs nothing else.
    ///
    /// # Errors
    /// Those of [`Self::report`].
    pub async fn report_page(
        &self,
        dataset_id: Uuid,
        settings: ReportSettings,
    ) -> Result<(String, bool), PreparationError> {
        let report = self.report(dataset_id, settings).await?;
        let shown: HashMap<Uuid, String> = report::html::pictures(&report);
        let made: HashMap<Uuid, Vec<u8>> = stream::iter(shown)
            .map(async |(image_id, sha256)| {
                let planned = Planned {
                    name: thumbnails::name(&[
                        "thumbnail",
                        &sha256,
                        &report::html::SIDE_PX.to_string(),
                    ]),
                    sha256,
                    side_px: report::html::SIDE_PX,
                    framing: None,
                };
                let made = self.render(planned).await.ok()?;
                Some((image_id, made.bytes))
            })
            .buffer_unordered(AT_ONCE)
            .filter_map(async |made| made)
            .collect()
            .await;
        let complete = report.complete;
        let page = spawn_blocking(move || report::html::page(&report, &made)).await?;
        Ok((page, complete))
    }

    /// Measures what was uploaded, one picture at a time, for as long as it is polled.
    pub async fn measure_in_background(self) {
        loop {
            match self.measure_some().await {
                Ok(true) => continue,
                Ok(false) => {}
                Err(error) => tracing::error!(%error, "measuring pictures in the background"),
            }
            tokio::select! {
                () = self.wake.notified() => {}
                () = tokio::time::sleep(BACKGROUND_PAUSE) => {}
            }
        }
    }

    /// Whether there was something to do.
    async fn measure_some(&self) -> Result<bool, PreparationError> {
        let missing = self
            .store
            .unmeasured_pictures(FORMAT, BACKGROUND_PICTURES)
            .await?;
        let missing: HashSet<String> = missing.into_iter().collect();
        let any = !missing.is_empty();
        for sha256 in missing {
            let found = self.measure_one(sha256, None).await?;
            self.keep(found.as_slice()).await?;
        }
        Ok(any)
    }

    async fn dataset(&self, id: Uuid) -> Result<Dataset, PreparationError> {
        self.store.dataset(id).await.map_err(|error| match error {
            StoreError::NotFound => PreparationError::DatasetNotFound(id),
            error => error.into(),
        })
    }

    async fn image(&self, dataset_id: Uuid, id: Uuid) -> Result<Image, PreparationError> {
        match self.store.image(id).await {
            Ok(image) if image.dataset_id == dataset_id => Ok(image),
            Ok(_) | Err(StoreError::NotFound) => Err(PreparationError::ImageNotFound(id)),
            Err(error) => Err(error.into()),
        }
    }
}

fn thumbnail(image: &Image, side_px: u32) -> Planned {
    Planned {
        name: thumbnails::name(&["thumbnail", &image.sha256, &side_px.to_string()]),
        sha256: image.sha256.clone(),
        side_px,
        framing: None,
    }
}

impl Planned {
    /// `path_of` tells where the file with a digest is.
    fn make(&self, path_of: impl Fn(&str) -> PathBuf) -> Result<Thumbnail, PreparationError> {
        let path = path_of(&self.sha256);
        let background = self.framing.as_ref().and_then(|f| f.look.background);
        let picture = decode(&path, background)?;
        let picture = match &self.framing {
            None => picture,
            Some(framing) => framing.apply(picture, &path, path_of)?,
        };
        let size = fit_within(picture.dimensions(), self.side_px);
        let small = resize(picture, size);
        thumbnails::encode(&small).map_err(PreparationError::Encode)
    }
}

fn check(settings: &BucketSettings) -> Result<(), PreparationError> {
    match settings.problems().into_iter().next() {
        Some((field, message)) => Err(PreparationError::Settings(field, message)),
        None => Ok(()),
    }
}

impl Framing {
    fn apply(
        &self,
        picture: RgbImage,
        path: &Path,
        path_of: impl Fn(&str) -> PathBuf,
    ) -> Result<RgbImage, PreparationError> {
        let placement = self.settings.place(picture.width(), picture.height());
        let framed = frame(picture, placement, self.look);
        let own = match &self.mask {
            None => return Ok(framed),
            Some(MaskOf::File(sha256)) => Some(path_of(sha256)),
            Some(MaskOf::Alpha) => None,
        };
        let mask = load_mask(path, own.as_deref(), &self.settings, self.look)?;
        Ok(match mask {
            Some(mask) => darkened(&framed, &mask),
            None => framed,
        })
    }
}

/// A picture with a quarter of its light where nothing of it counts.
fn darkened(picture: &RgbImage, mask: &GrayImage) -> RgbImage {
    RgbImage::from_fn(picture.width(), picture.height(), |x, y| {
        let counts = u32::from(mask.get_pixel(x, y).0[0]);
        let dim = |value: u8| (u32::from(value) * (255 + 3 * counts) / (4 * 255)) as u8;
        Rgb(picture.get_pixel(x, y).0.map(dim))
    })
}
