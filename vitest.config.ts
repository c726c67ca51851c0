import { defineConfig } from "vitest/config"

export default defineConfig({
  test: {
    reporters: ["default", "./scripts/summary-reporter.ts"],
    projects: [
      { test: { name: "packages", include: ["packages/*/test/**/*.test.ts", "test/fake/**/*.test.ts", "test/repository/**/*.test.ts"] } },
      { test: { name: "kvm", include: ["test/kvm/**/*.test.ts"], testTimeout: 60_000 } },
      { test: { name: "lab", include: ["test/lab/**/*.test.ts"], testTimeout: 900_000, hookTimeout: 900_000 } }
    ]
  }
})
