//! How pictures change from one showing to the next, as a function of the run's seed and the place in the run.

use rand::RngExt as _;

use crate::dataloader::{Augment, BucketSettings, CropMode, Look, Tint, TrainingImage, Window};
use crate::training::random::{Stream, generator};

/// What may be changed about an image of a run; where it is cut, the run can say for all of them. Regularization pictures
/// change like the others, as with sd-scripts.
pub fn augment(buckets: &BucketSettings, image: &TrainingImage) -> Augment {
    let own = image.augment;
    Augment {
        random_crop: own.random_crop || buckets.crop == CropMode::Random,
        ..own
    }
}

impl Augment {
    /// Whether latents of such an image are of one showing only.
    pub fn is_fresh(self) -> bool {
        self.color || self.random_crop
    }

    /// What is drawn for one showing: the picture's place in the batch of this number. `usual` is how it looks when
    /// nothing is drawn. Everything is drawn in any case, so that one setting does not change what another one gets.
    pub fn draw(self, seed: u64, number: u64, slot: usize, sha256: &str, usual: Look) -> Look {
        let place = format!("{number}/{slot}/{sha256}");
        let mut rng = generator(seed, Stream::Augment, place.as_bytes());
        let flipped = rng.random::<bool>();
        let window = Window::Drawn([rng.random(), rng.random()]);
        let tint = Tint::draw(&mut rng);
        Look {
            flipped: self.flip && flipped,
            window: if self.random_crop {
                window
            } else {
                usual.window
            },
            tint: tint.filter(|_| self.color),
            correction: usual.correction,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Augment = Augment {
        flip: true,
        color: true,
        random_crop: true,
    };

    fn draw(augment: Augment, seed: u64, number: u64) -> Look {
        augment.draw(seed, number, 0, "a", Look::default())
    }

    #[test]
    fn what_is_drawn_depends_on_seed_and_place_alone() {
        assert_eq!(draw(ALL, 1, 7), draw(ALL, 1, 7));
        let windows: Vec<_> = [(1, 7), (2, 7), (1, 8)]
            .map(|(seed, number)| draw(ALL, seed, number).window)
            .to_vec();
        assert!(windows[0] != windows[1] && windows[0] != windows[2]);
        let flips = (0..1000).filter(|number| draw(ALL, 3, *number).flipped);
        assert!((430..570).contains(&flips.count()));
    }

    #[test]
    fn one_setting_does_not_change_what_another_gets() {
        for number in 0..50 {
            let (all, flips) = (
                draw(ALL, 1, number),
                Augment {
                    color: false,
                    random_crop: false,
                    ..ALL
                },
            );
            let alone = draw(flips, 1, number);
            assert_eq!(alone.flipped, all.flipped);
            assert_eq!((alone.window, alone.tint), (Window::Centre, None));
            assert_eq!(draw(Augment::default(), 1, number), Look::default());
        }
    }
}
