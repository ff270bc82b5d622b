//! What a file's path says: kohya's folder names (`10_my_concept`, `10_my_concept_reg`, `reg/…`), and which paths are safe.

/// A file's place inside of an upload. The parts are names only: no `..`, no root, no drive.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    pub folders: Vec<String>,
    pub file_name: String,
}

/// A path that does not stay inside of its folder.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    #[error("the path is absolute")]
    Absolute,
    #[error("the path leads out of its folder with `..`")]
    Parent,
    #[error("the path has a control character or is too long")]
    Strange,
    #[error("the path names no file")]
    Empty,
}

const MAX_PATH_BYTES: usize = 1024;

impl Place {
    /// Reads a path with `/` or `\` between its parts.
    ///
    /// # Errors
    /// When the path is not plainly inside of its folder. We store by content, so nothing could be overwritten;
    /// but a path like that was made to hurt somebody.
    pub fn parse(path: &str) -> Result<Self, PathError> {
        if path.len() > MAX_PATH_BYTES || path.chars().any(char::is_control) {
            return Err(PathError::Strange);
        }
        let drive =
            path.as_bytes().get(1) == Some(&b':') && path.as_bytes()[0].is_ascii_alphabetic();
        if path.starts_with(['/', '\\']) || drive {
            return Err(PathError::Absolute);
        }
        let mut parts = Vec::new();
        for part in path.split(['/', '\\']) {
            match part {
                "" | "." => {}
                ".." => return Err(PathError::Parent),
                name => parts.push(name.to_owned()),
            }
        }
        let file_name = parts.pop().ok_or(PathError::Empty)?;
        Ok(Self {
            folders: parts,
            file_name,
        })
    }

    /// The same place seen from outside of the folders that it is in.
    #[must_use]
    pub fn within(mut self, folders: &[String]) -> Self {
        self.folders.splice(0..0, folders.iter().cloned());
        self
    }

    /// The file name without its last extension: what an image and its caption have in common.
    pub fn stem(&self) -> &str {
        Self::stem_of(&self.file_name)
    }

    /// The same, of a file name.
    pub fn stem_of(file_name: &str) -> &str {
        match file_name.rsplit_once('.') {
            Some((stem, _)) if !stem.is_empty() => stem,
            _ => file_name,
        }
    }

    /// The last extension in lower case.
    pub fn extension(&self) -> String {
        match self.file_name.rsplit_once('.') {
            Some((stem, extension)) if !stem.is_empty() => extension.to_ascii_lowercase(),
            _ => String::new(),
        }
    }

    /// What operating systems leave in folders and archives; nobody means to upload it.
    pub fn is_litter(&self) -> bool {
        self.folders.iter().any(|folder| folder == "__MACOSX")
            || self.file_name.starts_with('.')
            || ["thumbs.db", "desktop.ini"].contains(&self.file_name.to_ascii_lowercase().as_str())
    }
}

/// The subset a file belongs to, as far as its folder says.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct FolderSubset {
    pub name: String,
    /// `None` when the folder's name does not say.
    pub repeats: Option<u32>,
    pub is_reg: bool,
    /// What a folder's name holds beside the number: kohya's class tokens.
    pub tokens: Option<String>,
}

/// The folder that all files are in, if it says nothing by itself and may be looked through.
pub fn common_folder<'a>(places: impl Iterator<Item = &'a Place> + Clone) -> Option<&'a str> {
    let first = places.clone().next()?.folders.first()?;
    let shared = places
        .clone()
        .all(|place| place.folders.first() == Some(first));
    // a lone folder of images names a subset only by kohya's rule; then and for `reg` it has to stay
    (shared && !is_reg_folder(first) && kohya_folder(first).is_none()).then_some(first.as_str())
}

/// The subset of a file in these folders; `None` when it lies outside of any, and the upload's own subset is meant.
pub fn subset_of(folders: &[String]) -> Option<FolderSubset> {
    let below_reg = folders.iter().any(|folder| is_reg_folder(folder));
    if let Some((repeats, tokens)) = folders.iter().rev().find_map(|folder| kohya_folder(folder)) {
        let folder_name = format!("{repeats}_{tokens}");
        let marked = tokens.strip_suffix("_reg").filter(|rest| !rest.is_empty());
        let is_reg = below_reg || marked.is_some();
        return Some(FolderSubset {
            // under `reg/` the mark is added, so that a concept and its regularization never share a name
            name: if is_reg && marked.is_none() {
                format!("{folder_name}_reg")
            } else {
                folder_name
            },
            repeats: Some(repeats),
            is_reg,
            tokens: Some(marked.unwrap_or(tokens).to_owned()),
        });
    }
    let last = folders.last()?;
    Some(FolderSubset {
        name: last.clone(),
        repeats: None,
        is_reg: below_reg,
        tokens: None,
    })
}

/// `<repeats>_<class tokens>`; sd-scripts skips every other folder.
pub fn kohya_folder(name: &str) -> Option<(u32, &str)> {
    let (number, tokens) = name.split_once('_')?;
    let digits = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
    let repeats = number
        .parse()
        .ok()
        .filter(|_| digits && !tokens.is_empty())?;
    Some((repeats, tokens))
}

fn is_reg_folder(name: &str) -> bool {
    name.eq_ignore_ascii_case("reg")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(path: &str) -> Place {
        Place::parse(path).expect("a safe path")
    }

    #[test]
    fn unsafe_paths_are_refused() {
        for (path, error) in [
            ("../a.png", PathError::Parent),
            ("a/../../b.png", PathError::Parent),
            ("a\\..\\b.png", PathError::Parent),
            ("/etc/passwd", PathError::Absolute),
            ("\\\\host\\a.png", PathError::Absolute),
            ("C:\\a.png", PathError::Absolute),
            ("c:a.png", PathError::Absolute),
            ("a\0.png", PathError::Strange),
            ("./", PathError::Empty),
        ] {
            assert_eq!(Place::parse(path), Err(error), "{path:?}");
        }
        assert_eq!(Place::parse(""), Err(PathError::Empty));
        assert_eq!(Place::parse(&"a".repeat(2000)), Err(PathError::Strange));
    }

    #[test]
    fn names_are_split() {
        let place = place("./10_x//b.c.PNG");
        assert_eq!(
            (
                place.folders.as_slice(),
                place.stem(),
                place.extension().as_str()
            ),
            (&["10_x".to_owned()][..], "b.c", "png")
        );
        assert_eq!(Place::parse("x/.txt").expect("safe").stem(), ".txt");
        assert!(
            Place::parse("__MACOSX/10_x/._a.png")
                .expect("safe")
                .is_litter()
        );
        assert!(Place::parse("a/Thumbs.db").expect("safe").is_litter());
    }

    #[test]
    fn folders_say_what_kohya_says() {
        let subset = |path: &str| subset_of(&place(path).folders);
        let of = |name: &str, repeats, is_reg, tokens: Option<&str>| {
            Some(FolderSubset {
                name: name.to_owned(),
                repeats,
                is_reg,
                tokens: tokens.map(str::to_owned),
            })
        };
        assert_eq!(
            subset("10_my_concept/a.png"),
            of("10_my_concept", Some(10), false, Some("my_concept"))
        );
        assert_eq!(
            subset("10_my_concept_reg/a.png"),
            of("10_my_concept_reg", Some(10), true, Some("my_concept"))
        );
        assert_eq!(
            subset("reg/1_dog/a.png"),
            of("1_dog_reg", Some(1), true, Some("dog"))
        );
        assert_eq!(
            subset("x/1_dog/deeper/a.png"),
            of("1_dog", Some(1), false, Some("dog"))
        );
        assert_eq!(subset("photos/a.png"), of("photos", None, false, None));
        assert_eq!(subset("reg/a.png"), of("reg", None, true, None));
        assert_eq!(subset("a.png"), None);
        assert_eq!(kohya_folder("+1_x"), None);
        assert_eq!(kohya_folder("99999999999_x"), None);
        assert_eq!(kohya_folder("10_"), None);
        assert_eq!(kohya_folder("0_x"), Some((0, "x")));
    }

    #[test]
    fn a_single_leading_folder_is_looked_through() {
        let common = |paths: &[&str]| {
            let places: Vec<Place> = paths.iter().map(|path| place(path)).collect();
            common_folder(places.iter()).map(str::to_owned)
        };
        assert_eq!(
            common(&["set/10_a/1.png", "set/2_b/2.png"]).as_deref(),
            Some("set")
        );
        assert_eq!(common(&["set/1.png", "set/2.png"]).as_deref(), Some("set"));
        assert_eq!(common(&["10_a/1.png", "10_a/2.png"]), None);
        assert_eq!(common(&["reg/10_a/1.png"]), None);
        assert_eq!(common(&["set/1.png", "2.png"]), None);
        assert_eq!(common(&[]), None);
    }
}
