//! The words that stand for subjects, and where they must not be: in captions of regularization images. Those show what
//! the model knew before; a caption with the subject's word would teach it that the word means the class.

use uuid::Uuid;

use crate::store::datasets::Subset;

/// The instance prompts of a dataset, and which of them a regularization subset may use.
#[derive(Clone, Debug, Default)]
pub struct Subjects {
    /// As words, with the prompts themselves.
    prompts: Vec<(Vec<String>, String)>,
    /// Regularization subsets, with the words of their class prompts.
    regularization: Vec<(Uuid, Vec<String>)>,
}

impl Subjects {
    /// Those of a dataset's subsets.
    pub fn of(subsets: &[Subset]) -> Self {
        let prompts = subsets.iter().filter(|subset| !subset.is_reg);
        let prompts = prompts.filter_map(|subset| subset.instance_prompt.clone());
        let prompts = prompts.map(|prompt| (words(&prompt), prompt));
        let regularization = subsets.iter().filter(|subset| subset.is_reg);
        Self {
            prompts: prompts.filter(|(words, _)| !words.is_empty()).collect(),
            regularization: regularization
                .map(|subset| {
                    (
                        subset.id,
                        words(subset.class_prompt.as_deref().unwrap_or("")),
                    )
                })
                .collect(),
        }
    }

    /// The instance prompt that a caption of a regularization image names and that the one before did not.
    ///
    /// A prompt that the subset's own class prompt has in it (an instance prompt `dog` beside the class `dog`) is a word
    /// of the class too, and allowed: without it the class could not be described.
    pub fn newly_named(&self, subset_id: Uuid, before: &str, after: &str) -> Option<&str> {
        let (_, class) = self
            .regularization
            .iter()
            .find(|(id, _)| *id == subset_id)?;
        let (before, after) = (words(before), words(after));
        let named = self.prompts.iter().find(|(prompt, _)| {
            contains(&after, prompt) && !contains(&before, prompt) && !contains(class, prompt)
        });
        named.map(|(_, prompt)| prompt.as_str())
    }
}

/// Words in lower case: what is between spaces, underscores, commas and their like.
fn words(text: &str) -> Vec<String> {
    let words = text.split(|c: char| !(c.is_alphanumeric() || c == '\''));
    let words = words.filter(|word| !word.is_empty());
    words.map(str::to_lowercase).collect()
}

fn contains(text: &[String], phrase: &[String]) -> bool {
    text.windows(phrase.len()).any(|window| window == phrase)
}

#[cfg(test)]
mod tests {
    use time::OffsetDateTime;

    use super::*;
    use crate::store::datasets::SubsetTraining;

    fn subset(number: u128, is_reg: bool, prompt: &str) -> Subset {
        let prompt = Some(prompt.to_owned());
        let (instance_prompt, class_prompt) = if is_reg {
            (None, prompt)
        } else {
            (prompt, None)
        };
        Subset {
            id: Uuid::from_u128(number),
            dataset_id: Uuid::nil(),
            name: number.to_string(),
            repeats: 1,
            is_reg,
            instance_prompt,
            class_prompt,
            training: SubsetTraining::default(),
            revision: 1,
            created_at: OffsetDateTime::UNIX_EPOCH,
        }
    }

    #[test]
    fn a_subject_is_told_by_its_words_in_a_row() {
        let subsets = [
            subset(1, false, "sks_dog"),
            subset(2, false, "cat"),
            subset(3, true, "dog"),
            subset(4, true, "a cat"),
        ];
        let subjects = Subjects::of(&subsets);
        let named =
            |number, before, after| subjects.newly_named(Uuid::from_u128(number), before, after);
        assert_eq!(named(3, "", "photo of a Sks Dog, sitting"), Some("sks_dog"));
        assert_eq!(named(3, "", "a dog, sks"), None);
        assert_eq!(named(3, "", "concatenate"), None);
        assert_eq!(named(3, "sks dog", "sks dog, big"), None);
        // The class of the fourth is the word itself.
        assert_eq!(
            (named(3, "", "a cat"), named(4, "", "a cat")),
            (Some("cat"), None)
        );
        // Not regularization.
        assert_eq!(named(1, "", "sks dog"), None);
    }
}
