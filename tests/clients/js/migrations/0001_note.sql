ALTER TABLE `drizzle_items` ADD `note` text;
