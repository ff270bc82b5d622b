//! Optimizer state by name: what survives a step, and a checkpoint.

use std::collections::BTreeMap;

use super::{Code, Shape, Tensors};

/// One named state.
pub enum StateValue<B: Tensors> {
    /// A tensor and its own shape.
    Tensor(B::Tensor, Shape),
    /// A tensor in 8 bits per element, its map and its own shape.
    Blocks(B::Blocks, Code, Shape),
    /// An integer.
    Counter(i64),
}

/// The states of one run, keyed by parameter name (empty for the optimizer as a whole) and state name.
pub struct States<B: Tensors> {
    values: BTreeMap<String, BTreeMap<String, StateValue<B>>>,
}

impl<B: Tensors> Default for States<B> {
    fn default() -> Self {
        Self {
            values: BTreeMap::new(),
        }
    }
}

impl<B: Tensors> States<B> {
    /// The state, if there is one.
    pub fn get(&self, param: &str, name: &str) -> Option<&StateValue<B>> {
        self.values.get(param)?.get(name)
    }

    /// Sets a state and hands back the earlier one.
    pub fn insert(
        &mut self,
        param: &str,
        name: &str,
        value: StateValue<B>,
    ) -> Option<StateValue<B>> {
        if !self.values.contains_key(param) {
            self.values.insert(param.to_owned(), BTreeMap::new());
        }
        self.values
            .get_mut(param)
            .and_then(|names| names.insert(name.to_owned(), value))
    }

    /// All states: parameter name, state name, value, in order of the names.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str, &StateValue<B>)> {
        self.values.iter().flat_map(|(param, names)| {
            names
                .iter()
                .map(move |(name, value)| (param.as_str(), name.as_str(), value))
        })
    }

    /// As [`iter`](Self::iter), to be changed.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (&str, &str, &mut StateValue<B>)> {
        self.values.iter_mut().flat_map(|(param, names)| {
            names
                .iter_mut()
                .map(move |(name, value)| (param.as_str(), name.as_str(), value))
        })
    }

    /// Takes over all states of `newer`.
    pub fn merge(&mut self, newer: Self) {
        for (param, names) in newer.values {
            self.values.entry(param).or_default().extend(names);
        }
    }
}
