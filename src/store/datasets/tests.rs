//! The queries of datasets, subsets and images against a real database file.

use sea_orm::EntityTrait as _;
use uuid::Uuid;

use super::{
    AddedImage, ImageFilter, ImageUpdate, NewImage, SubsetAugment, SubsetHints, SubsetSettings,
    SubsetTraining,
};
use crate::store::StoreError;
use crate::store::rows::run;
use crate::store::runs::NewRun;
use crate::store::testing::store;

fn picture(subset_id: Uuid, content: &str, caption: Option<&str>) -> NewImage {
    NewImage {
        subset_id,
        file_name: format!("{content}.png"),
        sha256: content.to_owned(),
        media_type: "image/png".to_owned(),
        size_bytes: 5_000_000_000,
        width_px: 64,
        height_px: 48,
        caption: caption.map(str::to_owned),
        has_alpha: false,
        mask_sha256: None,
        background: None,
    }
}

fn ids(added: &[AddedImage]) -> Vec<Uuid> {
    let id = |added: &AddedImage| match added {
        AddedImage::New(id) | AddedImage::Present(id) => *id,
    };
    added.iter().map(id).collect()
}

#[tokio::test]
async fn datasets_are_listed_in_pages_and_deleted() {
    let (_folder, store) = store().await;
    let mut made = Vec::new();
    for name in ["a", "b", "c"] {
        made.push(store.create_dataset(name).await.expect("made"));
    }
    let first = store.list_datasets(None, 2).await.expect("a page");
    assert_eq!(first, made[..2]);
    let rest = store
        .list_datasets(Some(first[1].id), 2)
        .await
        .expect("a page");
    assert_eq!(rest, made[2..]);
    assert_eq!(store.dataset(made[1].id).await.expect("there"), made[1]);
    store
        .delete_dataset(made[1].id, None)
        .await
        .expect("deleted");
    let again = store.delete_dataset(made[1].id, None).await;
    assert!(matches!(again, Err(StoreError::NotFound)));
    assert!(matches!(
        store.dataset(made[1].id).await,
        Err(StoreError::NotFound)
    ));
}

#[tokio::test]
async fn a_subset_is_found_again_and_changed_at_its_revision() {
    let (_folder, store) = store().await;
    let dataset = store.create_dataset("a").await.expect("made").id;
    let hints = SubsetHints {
        repeats: Some(10),
        instance_prompt: Some("lumo".to_owned()),
        ..SubsetHints::default()
    };
    let made = store
        .ensure_subset(dataset, "10_lumo", &hints)
        .await
        .expect("made");
    assert_eq!((made.repeats, made.is_reg, made.revision), (10, false, 1));
    let same = store
        .ensure_subset(dataset, "10_lumo", &SubsetHints::default())
        .await;
    assert_eq!(same.expect("found"), made);
    let settings = SubsetSettings {
        name: "lumo".to_owned(),
        repeats: 3,
        is_reg: true,
        instance_prompt: None,
        class_prompt: Some("robot".to_owned()),
        training: SubsetTraining {
            augment: SubsetAugment {
                flip_aug: Some(true),
                ..SubsetAugment::default()
            },
            ..SubsetTraining::default()
        },
    };
    let changed = store
        .update_subset(made.id, &settings, 1)
        .await
        .expect("changed");
    assert_eq!(changed.training, settings.training);
    assert_eq!(
        (
            changed.repeats,
            changed.instance_prompt.as_deref(),
            changed.revision
        ),
        (3, None, 2)
    );
    let late = store
        .update_subset(
            made.id,
            &SubsetSettings {
                repeats: 4,
                ..settings.clone()
            },
            1,
        )
        .await;
    assert!(matches!(
        late,
        Err(StoreError::Conflict {
            expected: 1,
            found: 2
        })
    ));
    store
        .ensure_subset(dataset, "dog", &hints)
        .await
        .expect("made");
    let taken = store
        .update_subset(
            made.id,
            &SubsetSettings {
                name: "dog".to_owned(),
                ..settings
            },
            2,
        )
        .await;
    assert!(matches!(taken, Err(StoreError::Exists)), "{taken:?}");
    let nowhere = store.ensure_subset(Uuid::now_v7(), "x", &hints).await;
    assert!(matches!(nowhere, Err(StoreError::NotFound)));
}

#[tokio::test]
async fn the_same_content_is_one_image_of_a_subset() {
    let (_folder, store) = store().await;
    let dataset = store.create_dataset("a").await.expect("made").id;
    let one = store
        .ensure_subset(dataset, "one", &SubsetHints::default())
        .await
        .expect("made")
        .id;
    let reg = SubsetHints {
        is_reg: Some(true),
        ..SubsetHints::default()
    };
    let two = store
        .ensure_subset(dataset, "two", &reg)
        .await
        .expect("made")
        .id;
    let upload = vec![
        picture(one, "x", None),
        picture(one, "y", Some("of y")),
        picture(two, "x", None),
    ];
    let first = store.add_images(dataset, upload).await.expect("added");
    assert!(
        first
            .iter()
            .all(|added| matches!(added, AddedImage::New(_)))
    );
    let upload = vec![picture(one, "x", Some("of x")), picture(one, "y", None)];
    let second = store.add_images(dataset, upload).await.expect("added");
    assert!(
        second
            .iter()
            .all(|added| matches!(added, AddedImage::Present(_)))
    );
    assert_eq!(ids(&first)[..2], ids(&second));

    let all = store.all_images(dataset).await.expect("read");
    let seen: Vec<_> = all
        .iter()
        .map(|(image, subset)| {
            (
                subset.name.as_str(),
                image.caption.as_deref(),
                image.revision,
            )
        })
        .collect();
    assert_eq!(
        seen,
        [
            ("one", Some("of x"), 2),
            ("one", Some("of y"), 1),
            ("two", None, 1)
        ]
    );
    assert_eq!(all[0].0.size_bytes, 5_000_000_000);
    let counts = store.count_datasets(&[dataset]).await.expect("counted")[&dataset];
    assert_eq!(
        (
            counts.subsets,
            counts.images,
            counts.reg_images,
            counts.captioned_images
        ),
        (2, 3, 1, 2)
    );

    let of = |subset_id| ImageFilter {
        subset_id: Some(subset_id),
        ..ImageFilter::default()
    };
    let page = store
        .list_images(dataset, &of(one), None, 1)
        .await
        .expect("a page");
    let rest = store
        .list_images(dataset, &of(one), Some(page[0].id), 5)
        .await
        .expect("a page");
    assert_eq!(
        (page.len(), rest.len(), rest[0].subset_name.as_str()),
        (1, 1, "one")
    );
}

#[tokio::test]
async fn captions_change_at_their_revision() {
    let (_folder, store) = store().await;
    let dataset = store.create_dataset("a").await.expect("made");
    let subset = store
        .ensure_subset(dataset.id, "one", &SubsetHints::default())
        .await
        .expect("made")
        .id;
    let added = store
        .add_images(dataset.id, vec![picture(subset, "x", None)])
        .await
        .expect("added");
    let image = ids(&added)[0];
    let set = async |caption: Option<&str>, expected| {
        let update = ImageUpdate {
            caption: caption.map(str::to_owned),
            color_correction: None,
        };
        store.update_image(image, update, expected, None).await
    };
    assert_eq!(set(Some("one"), Some(1)).await.expect("set").revision, 2);
    assert!(matches!(
        set(Some("two"), Some(1)).await,
        Err(StoreError::Conflict {
            expected: 1,
            found: 2
        })
    ));
    assert_eq!(set(Some("one"), None).await.expect("unchanged").revision, 2);
    assert_eq!(set(None, Some(2)).await.expect("removed").caption, None);
    let many = vec![
        (image, "many".to_owned()),
        (Uuid::now_v7(), "gone".to_owned()),
    ];
    store.set_captions(dataset.id, many).await.expect("set");
    assert_eq!(
        store.image(image).await.expect("there").caption.as_deref(),
        Some("many")
    );
    assert!(store.dataset(dataset.id).await.expect("there").revision > dataset.revision);
    store.delete_image(image, None).await.expect("deleted");
    assert!(matches!(
        store.image(image).await,
        Err(StoreError::NotFound)
    ));
    assert!(matches!(
        store.delete_image(image, None).await,
        Err(StoreError::NotFound)
    ));
}

#[tokio::test]
async fn a_dataset_that_a_run_refers_to_stays() {
    let (_folder, store) = store().await;
    let dataset = store.create_dataset("a").await.expect("made").id;
    let run = NewRun {
        id: Uuid::now_v7(),
        spec: "{}".to_owned(),
        images: "[]".to_owned(),
        dataset_id: dataset,
        ..NewRun::default()
    };
    store.create_run(run).await.expect("a run");
    assert!(matches!(
        store.delete_dataset(dataset, None).await,
        Err(StoreError::InUse)
    ));
    store.dataset(dataset).await.expect("still there");
    run::Entity::delete_many()
        .exec(&store.db)
        .await
        .expect("no run");
    store.delete_dataset(dataset, None).await.expect("deleted");
}
