//! The order of training: repeats, regularization balance, batches of one bucket, shuffled anew in each epoch.

use std::collections::BTreeMap;

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use sha2::{Digest, Sha256};

use super::{BucketSettings, DataError, TrainingImage};

/// Pictures that are trained on together; all have the size of one bucket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Width and height.
    pub bucket: (u32, u32),
    /// Indices into the list of pictures that the plan was made from.
    pub images: Vec<usize>,
}

/// What an epoch consists of. The order of an epoch is a function of the seed and its number alone, so a run that is
/// taken up again sees what it would have seen.
#[derive(Clone, Debug)]
pub struct EpochPlan {
    /// Entries by bucket: indices of pictures, each as often as it is repeated.
    buckets: BTreeMap<(u32, u32), Vec<usize>>,
    batch_size: usize,
    seed: u64,
}

impl EpochPlan {
    /// Plans epochs of these pictures.
    ///
    /// Regularization pictures are balanced as sd-scripts does: as many appear as there are others; surplus ones are
    /// left out, missing ones are made up for by going round again.
    ///
    /// # Errors
    /// When the settings are wrong or there is nothing to train on.
    pub fn new(
        images: &[TrainingImage],
        settings: &BucketSettings,
        batch_size: usize,
        seed: u64,
    ) -> Result<Self, DataError> {
        settings.validate()?;
        let repeats = repeats(images);
        let mut buckets: BTreeMap<(u32, u32), Vec<usize>> = BTreeMap::new();
        for (index, (image, repeats)) in images.iter().zip(repeats).enumerate() {
            if repeats == 0 {
                continue;
            }
            let placement = settings.place(image.width_px.max(1), image.height_px.max(1));
            let entries = buckets.entry(placement.bucket).or_default();
            entries.extend(std::iter::repeat_n(index, repeats as usize));
        }
        if buckets.is_empty() {
            return Err(DataError::Empty);
        }
        Ok(Self {
            buckets,
            batch_size: batch_size.max(1),
            seed,
        })
    }

    /// Indices of pictures by the size of their bucket, each as often as an epoch shows it.
    pub fn buckets(&self) -> &BTreeMap<(u32, u32), Vec<usize>> {
        &self.buckets
    }

    /// How many batches an epoch has.
    pub fn batches_per_epoch(&self) -> usize {
        self.buckets
            .values()
            .map(|entries| entries.len().div_ceil(self.batch_size))
            .sum()
    }

    /// How many pictures an epoch shows, repeats counted.
    pub fn images_per_epoch(&self) -> usize {
        self.buckets.values().map(Vec::len).sum()
    }

    /// The batches of an epoch, in order. The last batch of a bucket may be smaller.
    pub fn batches(&self, epoch: u64) -> Vec<Batch> {
        let mut rng = self.generator(epoch);
        let mut batches = Vec::with_capacity(self.batches_per_epoch());
        for (bucket, entries) in &self.buckets {
            let mut entries = entries.clone();
            entries.shuffle(&mut rng);
            batches.extend(entries.chunks(self.batch_size).map(|images| Batch {
                bucket: *bucket,
                images: images.to_vec(),
            }));
        }
        batches.shuffle(&mut rng);
        batches
    }

    fn generator(&self, epoch: u64) -> ChaCha8Rng {
        let mut digest = Sha256::new();
        digest.update(b"lorasmith epoch order");
        digest.update(self.seed.to_le_bytes());
        digest.update(epoch.to_le_bytes());
        ChaCha8Rng::from_seed(digest.finalize().into())
    }
}

/// How often each picture appears in an epoch.
fn repeats(images: &[TrainingImage]) -> Vec<u32> {
    let wanted: u64 = images
        .iter()
        .filter(|image| !image.regularization)
        .map(|image| u64::from(image.repeats))
        .sum();
    let mut repeats: Vec<u32> = images
        .iter()
        .map(|image| {
            if image.regularization {
                0
            } else {
                image.repeats
            }
        })
        .collect();
    let regularization: Vec<usize> = (0..images.len())
        .filter(|index| images[*index].regularization && images[*index].repeats > 0)
        .collect();
    let mut have = 0_u64;
    let mut first_round = true;
    while have < wanted && !regularization.is_empty() {
        for index in &regularization {
            let more = if first_round {
                images[*index].repeats
            } else {
                1
            };
            repeats[*index] += more;
            have += u64::from(more);
            if have >= wanted {
                break;
            }
        }
        first_round = false;
    }
    repeats
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataloader::{Augment, CaptionSettings};

    fn image(id: &str, size: (u32, u32), repeats: u32, regularization: bool) -> TrainingImage {
        TrainingImage {
            id: id.to_owned(),
            path: id.into(),
            sha256: String::new(),
            width_px: size.0,
            height_px: size.1,
            caption: String::new(),
            repeats,
            regularization,
            mask: None,
            background: None,
            augment: Augment::default(),
            correction: None,
            captioning: CaptionSettings::default(),
        }
    }

    #[test]
    fn every_picture_appears_as_often_as_it_is_repeated_in_batches_of_one_size() {
        let images = [
            image("a", (512, 512), 3, false),
            image("b", (640, 480), 2, false),
            image("c", (600, 600), 4, false),
        ];
        let plan = EpochPlan::new(&images, &BucketSettings::default(), 2, 7).unwrap();
        let batches = plan.batches(0);
        // Seven squares make four batches, two landscapes one.
        assert_eq!((batches.len(), plan.batches_per_epoch()), (5, 5));
        let mut seen = [0; 3];
        for batch in &batches {
            for index in &batch.images {
                seen[*index] += 1;
                let size = (images[*index].width_px, images[*index].height_px);
                let placement = BucketSettings::default().place(size.0, size.1);
                assert_eq!(placement.bucket, batch.bucket);
            }
        }
        assert_eq!(seen, [3, 2, 4]);
    }

    #[test]
    fn the_order_is_a_function_of_seed_and_epoch() {
        let images: Vec<_> = (0..20)
            .map(|index| image(&index.to_string(), (512, 512), 1, false))
            .collect();
        let plan = |seed| EpochPlan::new(&images, &BucketSettings::default(), 4, seed).unwrap();
        assert_eq!(plan(1).batches(3), plan(1).batches(3));
        assert_ne!(plan(1).batches(3), plan(1).batches(4));
        assert_ne!(plan(1).batches(3), plan(2).batches(3));
    }

    #[test]
    fn regularization_pictures_are_balanced() {
        let images = [
            image("subject", (512, 512), 10, false),
            image("r1", (512, 512), 3, true),
            image("r2", (512, 512), 3, true),
        ];
        // First round 3 + 3, then one each until 10: 5 and 5.
        assert_eq!(repeats(&images), [10, 5, 5]);
        let images = [
            image("subject", (512, 512), 4, false),
            image("r1", (512, 512), 3, true),
            image("r2", (512, 512), 3, true),
            image("r3", (512, 512), 3, true),
        ];
        // The second picture reaches the count with all of its repeats; the third is surplus.
        assert_eq!(repeats(&images), [4, 3, 3, 0]);
    }

    #[test]
    fn nothing_to_train_on_is_an_error() {
        let only_regularization = [image("r", (512, 512), 5, true)];
        let plan = EpochPlan::new(&only_regularization, &BucketSettings::default(), 1, 0);
        assert!(matches!(plan, Err(DataError::Empty)));
    }
}
