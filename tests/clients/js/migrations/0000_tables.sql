CREATE TABLE `drizzle_items` (`id` integer PRIMARY KEY AUTOINCREMENT NOT NULL, `name` text UNIQUE, `size` integer);
--> statement-breakpoint
CREATE TABLE `drizzle_values` (`n` integer PRIMARY KEY NOT NULL, `integer` integer, `real` real, `text` text, `blob` blob);
--> statement-breakpoint
CREATE TABLE `drizzle_big` (`n` integer PRIMARY KEY NOT NULL, `label` text);
--> statement-breakpoint
CREATE TABLE `drizzle_work` (`worker` integer NOT NULL, `n` integer NOT NULL);
