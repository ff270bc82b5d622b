//! What is to be done to colours, as rows hold it. The files stay as they are.

/// What is done to the colours of an image, or of all images of a dataset that say nothing themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Correction {
    /// Nothing, whatever the dataset says.
    Off,
    /// The values are spread to the whole range.
    AutoLevels,
    /// The channels get the same mean.
    GreyWorld,
    /// The channels get the median of the set.
    MatchMedian,
}

impl Correction {
    const ALL: [(Self, &'static str); 4] = [
        (Self::Off, "off"),
        (Self::AutoLevels, "auto_levels"),
        (Self::GreyWorld, "grey_world"),
        (Self::MatchMedian, "match_median"),
    ];

    /// The word of a row.
    pub(super) fn to_row(self) -> String {
        let found = Self::ALL.iter().find(|(correction, _)| *correction == self);
        found.map_or_else(String::new, |(_, word)| (*word).to_owned())
    }

    /// What a word means; one of a later program means nothing.
    pub(super) fn of_row(word: Option<&str>) -> Option<Self> {
        let found = Self::ALL.iter().find(|(_, known)| Some(*known) == word);
        found.map(|(correction, _)| *correction)
    }
}
