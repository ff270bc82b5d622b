//! Other names of optimizers: those that sd-scripts has, and near misses.

use super::settings::distance;

/// What `--optimizer_type` of sd-scripts takes, and the optimizer that does the same. Paged states lie in the main memory
/// there and come when they are needed; the numbers are those of the state that stays.
const SD_SCRIPTS: [(&str, &str); 16] = [
    ("AdamW", "adamw"),
    ("PagedAdamW", "adamw"),
    ("PagedAdamW32bit", "adamw"),
    ("AdamW8bit", "adamw8bit"),
    ("PagedAdamW8bit", "adamw8bit"),
    ("Lion", "lion"),
    ("Lion8bit", "lion8bit"),
    ("PagedLion8bit", "lion8bit"),
    ("SGDNesterov", "sgd"),
    ("AdaFactor", "adafactor"),
    ("Prodigy", "prodigy"),
    ("DAdaptAdam", "dadapt-adam"),
    ("AdamWScheduleFree", "adamw-schedulefree"),
    ("CAME", "came"),
    ("Adan", "adan"),
    ("Muon", "muon"),
];

/// The other names of an optimizer.
pub fn aliases(id: &str) -> Vec<&'static str> {
    let mine = SD_SCRIPTS.iter().filter(|(_, known)| *known == id);
    mine.map(|(alias, _)| *alias).collect()
}

/// The id among `ids` that is meant by `name`: itself, or another name, whatever its capitals and dashes.
pub fn canonical<'a>(name: &str, ids: impl Iterator<Item = &'a str> + Clone) -> Option<&'a str> {
    let plain = plain(name);
    let by_id = || ids.clone().find(|id| self::plain(id) == plain);
    let by_alias = || {
        let (_, id) = SD_SCRIPTS
            .iter()
            .find(|(alias, _)| self::plain(alias) == plain)?;
        ids.clone().find(|known| known == id)
    };
    ids.clone()
        .find(|id| *id == name)
        .or_else(by_id)
        .or_else(by_alias)
}

/// The name that looks most like `name`, if one does.
pub fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let wanted = plain(name);
    let (edits, known) = known
        .map(|known| (distance(&wanted, &plain(known)), known))
        .min()?;
    (edits <= 2.max(wanted.len() / 4) && edits < wanted.len()).then_some(known)
}

fn plain(name: &str) -> String {
    let letters = name.chars().filter(|c| !matches!(c, '-' | '_'));
    letters.flat_map(char::to_lowercase).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDS: [&str; 4] = ["adamw", "adamw8bit", "dadapt-adam", "sgd"];

    #[test]
    fn names_of_sd_scripts_are_understood() {
        for (name, id) in [
            ("adamw", Some("adamw")),
            ("AdamW8bit", Some("adamw8bit")),
            ("PagedAdamW8bit", Some("adamw8bit")),
            ("DAdaptAdam", Some("dadapt-adam")),
            ("SGDNesterov", Some("sgd")),
            ("Lion", None), // not loaded here
            ("adamx", None),
        ] {
            assert_eq!(canonical(name, IDS.into_iter()), id, "{name}");
        }
    }

    #[test]
    fn near_misses_are_suggested() {
        for (name, id) in [
            ("adamx", Some("adamw")),
            ("adam8bit", Some("adamw8bit")),
            ("dadaptadm", Some("dadapt-adam")),
            ("x", None),
            ("shampoo", None),
        ] {
            assert_eq!(nearest(name, IDS.into_iter()), id, "{name}");
        }
    }
}
