//! Columns that a migration adds to a table that is there.

use sea_orm_migration::prelude::*;

/// Adds them one at a time: SQLite takes no more.
pub async fn add(
    manager: &SchemaManager<'_>,
    table: &'static str,
    columns: impl IntoIterator<Item = ColumnDef>,
) -> Result<(), DbErr> {
    for mut column in columns {
        let table = Table::alter()
            .table(Alias::new(table))
            .add_column(&mut column)
            .to_owned();
        manager.alter_table(table).await?;
    }
    Ok(())
}

/// Takes them away again.
pub async fn drop(
    manager: &SchemaManager<'_>,
    table: &'static str,
    columns: impl IntoIterator<Item = ColumnDef>,
) -> Result<(), DbErr> {
    for column in columns {
        let table = Table::alter()
            .table(Alias::new(table))
            .drop_column(Alias::new(column.get_column_name()))
            .to_owned();
        manager.alter_table(table).await?;
    }
    Ok(())
}
